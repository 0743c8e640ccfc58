"""Base layers whose frozen weights other libraries keep quantised, and their products under noise.

The library's own dequantise gives the weight for the time of one product, forward or backward, and
noise is added to that: the stored bits are never written. Nothing here imports those libraries: a
layer of theirs exists only where they are imported already.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._noise import Noise
from flatkern.ops._autocast import autocast_dtype
from flatkern.ops._noisy_derivative import call_noisy_linear_backward, explained
from flatkern.ops.noisy_linear import call_noisy_linear

# Elements that are dequantised at a time where a library's own temporaries are larger than the
# result, and rows in whole blocks of any format.
_PANEL, _ROWS = 2**20, 128


class Quantized:
    """The weight [m, n] of a base layer; see `flatkern.nn.sites.Quantized`."""

    def __init__(self, base: nn.Linear) -> None:
        """A layer of this kind."""
        self.base = base

    @property
    def shape(self) -> torch.Size:
        """[m, n]."""
        return torch.Size((self.base.out_features, self.base.in_features))

    @property
    def format(self) -> str:
        """The name of what the weight is stored as."""
        return type(self.base.weight).__name__

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype in which the layer multiplies whatever it is given, if it has one."""
        return None

    def why_not(self) -> str | None:
        """Why the weight cannot be dequantised here, or None if it can."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A new tensor, in the format's own dtype where it has one, else in `dtype`."""
        raise NotImplementedError

    def hold(self) -> None:
        """Keep the layer from writing its weight anew, until `release`."""

    def release(self) -> None:
        """Undo `hold`."""

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back: PEFT merges into a new one, whatever the format."""
        base, weight = self.base, self.base.weight

        def put_back() -> None:
            base.weight = weight

        return put_back


class _TorchAO(Quantized):
    """An nn.Linear over a tensor of torchao's, whose dtype is what it was quantised from."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self._has_slices = _has_slices(base.weight)

    @staticmethod
    def holds(base: nn.Module) -> bool:
        torchao = sys.modules.get("torchao.utils")
        weight = getattr(base, "weight", None)
        return torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor)

    def why_not(self) -> str | None:
        weight = self.base.weight
        if type(self.base) is not nn.Linear:
            return f"base layer {type(self.base).__name__} over torchao's {self.format}"
        if type(weight).dequantize is Tensor.dequantize:
            return f"torchao's {self.format}, which cannot be dequantised"
        # Their own products round the activations too, and have no gradient through that.
        if getattr(weight, "act_quant_kwargs", None) or getattr(
            weight, "activation_quantization", None
        ):
            return f"torchao's {self.format} with quantised activations"
        return None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight = self.base.weight.detach()
        # A compiler that fuses needs no temporaries, and would unroll the loop.
        if not self._has_slices or torch.compiler.is_compiling():
            return weight.dequantize()
        rows, cols = weight.shape
        step = max(_PANEL // max(cols, 1) // _ROWS, 1) * _ROWS
        out = torch.empty(rows, cols, dtype=weight.dtype, device=weight.device)
        for begin in range(0, rows, step):
            out[begin : begin + step] = weight[begin : begin + step].dequantize()
        return out


def _has_slices(weight: Tensor) -> bool:
    """Whether a torchao tensor can be cut into ranges of rows."""
    try:
        weight.detach()[:_ROWS].dequantize()
    except Exception:  # whatever this format says to it
        return False
    return True


class _Bnb4bit(Quantized):
    """bitsandbytes' Linear4bit (NF4, FP4)."""

    @staticmethod
    def holds(base: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(base, bnb.nn.Linear4bit)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self._repacks = getattr(base, "support_avx512bf16_for_cpu", False)

    @property
    def format(self) -> str:
        return self.base.weight.quant_state.quant_type

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.base.compute_dtype

    def why_not(self) -> str | None:
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return "bitsandbytes' Linear4bit that is not quantised yet"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes' Linear4bit that an evaluation on CPU has repacked (load the model "
                "anew, and attach before the first evaluation)"
            )
        return None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight = self.base.weight
        functional = sys.modules["bitsandbytes"].functional
        return functional.dequantize_4bit(weight.data, weight.quant_state)

    # An evaluation on a CPU with AVX512-BF16 repacks the weight and rounds its scales to bfloat16;
    # bitsandbytes 0.50 has no gradient afterwards.
    def hold(self) -> None:
        if self._repacks:
            self.base.support_avx512bf16_for_cpu = False

    def release(self) -> None:
        if self._repacks:
            self.base.support_avx512bf16_for_cpu = True


class _Bnb8bit(Quantized):
    """bitsandbytes' Linear8bitLt (LLM.int8())."""

    format = "int8"

    @staticmethod
    def holds(base: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(base, bnb.nn.Linear8bitLt)

    def why_not(self) -> str | None:
        if self.base.weight.dtype != torch.int8 or self._scales() is None:
            return "bitsandbytes' Linear8bitLt that is not quantised yet"
        return None

    def keep(self) -> Callable[[], None]:
        put_back_weight, state, kept = super().keep(), self.base.state, vars(self.base.state).copy()

        def put_back() -> None:
            put_back_weight()
            vars(state).update(kept)

        return put_back

    def _scales(self) -> Tensor | None:
        # The first forward moves them.
        scales = self.base.state.SCB
        return self.base.weight.SCB if scales is None else scales

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        # As the layer's own backward does.
        scales = self._scales().unsqueeze(1).mul(1.0 / 127.0)
        return self.base.weight.data.to(dtype, copy=True).mul_(scales)


class _FP8(Quantized):
    """transformers' FP8Linear: float8_e4m3fn with scales of blocks or of the tensor."""

    format = "float8_e4m3fn"

    @staticmethod
    def holds(base: nn.Module) -> bool:
        module = sys.modules.get("transformers.integrations.finegrained_fp8")
        fp8 = module is not None and isinstance(base, module.FP8Linear)
        return fp8 and base.weight.dtype == torch.float8_e4m3fn

    def why_not(self) -> str | None:
        module = sys.modules["transformers.integrations.finegrained_fp8"]
        if not hasattr(module, "_dequantize_fp8_weight"):
            return "FP8Linear of a transformers that has no gradient for it"
        return None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        base = self.base
        module = sys.modules["transformers.integrations.finegrained_fp8"]
        parts = base.weight.detach(), base.weight_scale_inv.detach(), base.block_size
        return module._dequantize_fp8_weight(*parts, dtype)


def stored(base: nn.Module) -> Quantized | None:
    """How a base layer keeps its weight, if quantised in a way that is known here."""
    for kind in (_TorchAO, _Bnb4bit, _Bnb8bit, _FP8):
        if kind.holds(base):
            return kind(base)
    return None


def noisy_product(window: Any, x: Tensor, weight: Quantized) -> Tensor:
    """x W_noisy^T + b with the window's noise.

    In the layer's own compute dtype, returned in x's; without one, as nn.Linear under autocast.
    """
    window.mark_called()
    dtype = weight.compute_dtype
    if dtype is None:
        dtype = autocast_dtype(x) or x.dtype
        x = x.to(dtype)
    options = {"compute_dtype": dtype, "backend": window.backend}
    # The noise's tensors by themselves: autograd looks into no tuple.
    noise = window.row_scale, window.key, window.elementwise
    return _Product.apply(x, weight.base.bias, *noise, weight, options)


class _Product(torch.autograd.Function):
    """The weight is dequantised, and its noise made, once for forward and once for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        row_scale: Tensor,
        key: Tensor,
        elementwise: bool,
        weight: Quantized,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(row_scale, key)
        ctx.weight, ctx.options = weight, options | {"elementwise": elementwise}
        ctx.bias_dtype = None if bias is None else bias.dtype
        operands = weight.dequantize(options["compute_dtype"]), bias, None, None, 1.0
        return call_noisy_linear(x, *operands, Noise(row_scale, key, elementwise), **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with explained():
            row_scale, key = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            operands = ctx.weight.dequantize(ctx.options["compute_dtype"]), None, None, 1.0
            needs = True, False, False
            # Without adapters no gradient needs x.
            (grad_x,) = call_noisy_linear_backward(
                grad, None, *operands, row_scale, key, *needs, **ctx.options
            )
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None
