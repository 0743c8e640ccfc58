"""Sites: where a base weight meets its adapters, and where a window can show it through noise."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from flatkern._noise import Noise
from flatkern.ops._autocast import autocast_dtype
from flatkern.ops._noisy_linear import scratch_of
from flatkern.ops.noisy_linear import NATIVE_LAYERS, call_noisy_linear

# The attribute under which a module of another library has its site; a plain object in the
# module's __dict__, so that no state_dict names it.
ATTRIBUTE = "_flatkern_site"
# What messages about an open window advise: whoever reads them may not have the object.
CLOSE_FIRST = "close the window first (flatkern.close(model) does, whoever opened it)"


class Quantized(Protocol):
    """A weight [m, n] that is stored in another form than its elements, and never written.

    Attributes:
        shape: [m, n].
        format: what it is stored as, for `WeightNoise.summary`.
    """

    shape: torch.Size
    format: str

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A new tensor, in the format's own dtype where it has one, else in `dtype`."""


class Site(Protocol):
    """What `flatkern.WeightNoise` asks of a layer: a `LoRALinear`, or one that was attached to.

    Attributes:
        weight: the base weight [m, n], clean outside windows; None where a window cannot show it.
        quantized: how it is stored, if not as [m, n] elements; None where it is.
        scaling: s of W' = W + s B A.
        merged: whether `weight` holds W' at the moment.
        takes_shards: whether a window can show `weight` where it is a DTensor.
        linear: whether the layer's output is x W'^T + b.
        _window: the weight's `noise.state.State` while a window is open, or None.
    """

    weight: Tensor | None
    quantized: Quantized | None
    scaling: float
    merged: bool
    takes_shards: bool
    linear: bool
    _window: Any

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k] of W'."""

    def row_factor(self) -> Tensor | float:
        """d of W' = diag(d) (W + s B A) in the open window: the gradient of W is d times W''s."""

    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters that are the adapter's, not the base model's, by name."""

    def operands(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s of W', as they are: for what needs no gradient."""

    def enter_window(self, window: Any) -> None:
        """Belong to the window that is being opened; the weight is clean at this time."""

    def require_closed(self, action: str) -> None:
        """RuntimeError while a window is open, paused or not."""


def site_of(module: nn.Module) -> Site | None:
    """The site of a module: itself, what was attached to it, or None."""
    # Asked of the class: a wrapper may pass on the attributes of what it wraps.
    return module if hasattr(type(module), "enter_window") else module.__dict__.get(ATTRIBUTE)


def noisy_product(
    window: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """x (W_noisy + s B A)^T + b with the window's noise, in the dtype that nn.Linear would give."""
    window.mark_called()
    sharded = window.sharded_linear
    if not (sharded or torch.compiler.is_compiling() or _are_functorch_transforms_active()):
        backend = window.backend
        if (run := NATIVE_LAYERS.get(backend)) is not None:
            return run(
                *(x, weight, bias, lora_A, lora_B, scaling),
                *(window.row_scale, window.key, window.elementwise),
                *scratch_of(backend, None),
            )
    dtype = autocast_dtype(x)
    return (sharded or call_noisy_linear)(
        # The op returns x's dtype; F.linear would return autocast's.
        x if dtype is None else x.to(dtype),
        weight,
        bias,
        lora_A,
        lora_B,
        scaling,
        Noise(window.row_scale, window.key, window.elementwise),
        compute_dtype=dtype,
        backend=window.backend,
    )
