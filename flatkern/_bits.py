"""Comparison to the bit: NaN payloads and the sign of zero count."""

import torch
from torch import Tensor


def count_changed(after: Tensor, before: Tensor) -> int:
    """How many elements, of 16 or 32 bits, have other bits than before."""
    return int((_bits(after) != _bits(before)).sum())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
