"""Which implementations are usable here, and which one an op takes.

Four implementations carry one meaning: `cuda` and `cpu` (C++, in `flatkern._C`), `triton`, and
`reference` (plain PyTorch). Under `auto` a tensor's device and dtype choose; a backend that is
named, by `with backend(name)` or by the environment variable FLATKERN_BACKEND, never falls back.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from flatkern._machine import TRITON_INTERPRETED, why_too_old
from flatkern._version import __version__

# What serves a device type, best first; reference serves every device.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
if TRITON_INTERPRETED:
    PREFERENCE = {"cuda": ("cuda", "reference"), "cpu": ("cpu", "triton", "reference")}
NAMES = ("cuda", "cpu", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Process-wide on purpose: backward runs on autograd's own threads and must see the same choice.
_named: str = os.environ.get("FLATKERN_BACKEND") or "auto"


def _load_extension() -> tuple[ModuleType | None, str]:
    """Import `flatkern._C`; return it, or None and the reason."""
    if importlib.util.find_spec("flatkern._C") is None:
        return None, (
            "flatkern._C was not built: "
            "pip install --no-build-isolation with a C++ compiler builds it, with nvcc for GPUs too"
        )
    try:
        return importlib.import_module("flatkern._C"), ""
    except ImportError as error:
        reason = f"flatkern._C does not load with torch {torch.__version__}: {error}"
        warnings.warn(
            f"{reason}. Falling back to pure Python; reinstall flatkern to rebuild it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason


_C, _why_no_extension = _load_extension()


@functools.cache
def _why_unusable(name: str) -> str | None:
    """Why backend `name` cannot run here, or None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        if importlib.util.find_spec("flatkern.triton") is None:
            return "this version has no Triton kernels"
        return importlib.import_module("flatkern.triton").why_unusable()
    if _C is None:
        return _why_no_extension
    if name == "cuda":
        if not (info := _C.build_info())["cuda"]:
            reason = info.get("why_no_cuda", "an older build")
            return f"flatkern._C was built without CUDA: {reason}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return _why_no_code(info["cuda"]["archs"], torch.cuda.get_device_capability())
    return None


def _why_no_code(archs: str, capability: tuple[int, int]) -> str | None:
    """Why code for `archs` (as in TORCH_CUDA_ARCH_LIST) cannot run on a GPU, or None."""
    if (reason := why_too_old(capability)) is not None:
        return reason
    for arch in re.split(r"[;\s]+", archs):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            return None  # a name, which only torch resolves
        built = int(match[1]), int(match[2])
        same_major = built[0] == capability[0]
        if built == capability or (not match[3] and same_major and built < capability):
            return None
        if match[4] and not match[3] and built < capability:
            return None
    own = f"{capability[0]}.{capability[1]}"
    return f"built for {archs}, this GPU is {own}: reinstall with TORCH_CUDA_ARCH_LIST={own}"


def available_backends(device_type: str = "cpu") -> list[str]:
    """Names of the backends that can run on tensors of `device_type`, best first."""
    names = PREFERENCE.get(device_type, ("reference",))
    return [name for name in names if _why_unusable(name) is None]


def named() -> str:
    """The current choice: "auto" or the name of a backend."""
    return _named


def resolve(device_type: str, dtype: torch.dtype = torch.float32, named: str | None = None) -> str:
    """The backend that an op takes for a tensor of this device type and dtype.

    Args:
        device_type: `tensor.device.type`.
        dtype: the weight's dtype; float64 is served by the reference alone.
        named: a backend to take instead of the current choice.

    Raises:
        RuntimeError: the named backend is not usable here.
        ValueError: the named backend is unknown, or does not serve this device or dtype.
    """
    name = named or _named
    if name == "auto":
        if dtype not in KERNEL_DTYPES:
            return "reference"
        name = _automatic(device_type)
        if name == "reference":
            _say_once_that_it_is_slow(device_type)
        return name
    _require_usable(name)
    if name not in PREFERENCE.get(device_type, ("reference",)):
        raise ValueError(
            f"backend {name!r} does not serve {device_type} tensors; "
            f"accepted here: {', '.join(available_backends(device_type))}"
        )
    if name != "reference" and dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"backend {name!r} serves float32, bfloat16 and float16 weights, got dtype {dtype}; "
            "the reference backend serves float64"
        )
    return name


def _automatic(device_type: str) -> str:
    """The best backend, but for interpreted Triton, which has to be named."""
    names = available_backends(device_type)
    return next(name for name in names if not (name == "triton" and TRITON_INTERPRETED))


@functools.cache
def _say_once_that_it_is_slow(device_type: str) -> None:
    better = PREFERENCE.get(device_type, ())[:-1]
    reasons = "; ".join(f"{name}: {_why_unusable(name)}" for name in better)
    warnings.warn(
        f"flatkern runs on plain PyTorch for {device_type} tensors, exact but slow "
        f"({reasons or 'no kernels for this device'})",
        RuntimeWarning,
        stacklevel=2,
    )


def _require_usable(name: str) -> None:
    if name not in NAMES:
        raise ValueError(
            f"backend (or FLATKERN_BACKEND) must be auto, {', '.join(NAMES)}; got {name!r}"
        )
    reason = _why_unusable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not usable: {reason}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation: `with flatkern.backend("reference"): ...` (process-wide).

    Args:
        name: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not usable here; the message says why.
    """
    global _named
    if name != "auto":
        _require_usable(name)
    before = _named
    # Twice, so that Ctrl-C at any line of this block restores too.
    try:
        try:
            _named = name
            yield
        finally:
            _named = before
    finally:
        _named = before


def _choice() -> str:
    """The current choice, and what is wrong with it: FLATKERN_BACKEND is not checked at import."""
    try:
        if _named != "auto":
            _require_usable(_named)
    except (RuntimeError, ValueError) as error:
        return f"{_named} ({error})"
    return _named


def build_info() -> dict[str, object]:
    """What is built and usable, and why the rest is not: plain values, printable as they are.

    `auto` is what an op takes on tensors of each device type that is there.
    """
    has_cuda = torch.cuda.is_available()
    return {
        "flatkern": __version__,
        "torch": torch.__version__,
        "backend": _choice(),
        "auto": {kind: _automatic(kind) for kind in PREFERENCE if kind != "cuda" or has_cuda},
        "backends": {name: _why_unusable(name) or "usable" for name in NAMES},
        "extension": _C.build_info() if _C is not None else _why_no_extension,
    }
