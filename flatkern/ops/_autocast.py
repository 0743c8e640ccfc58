"""What autocast asks for."""

import contextlib

import torch
from torch import Tensor

# Evaluated at import: torch 2.11's Dynamo cannot trace this call.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x enters a product, or None to leave it."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type not in _AUTOCAST_DEVICES:
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    """Products in the dtypes that they are given; costs nothing where autocast is off anyway."""
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
