"""PEFT's layers over other bases than `nn.Linear`: where the weight is, and what W' is."""

from typing import Any

import torch
from peft.tuners import adalora, lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatkern.integrations import quantized
from flatkern.integrations._peft_attention import PROJECTIONS, AttentionSite
from flatkern.integrations._peft_reasons import is_plain, not_plain, why_not_base, why_not_variant
from flatkern.integrations._peft_shown import ShownSite
from flatkern.nn.layouts import is_transposed, transposed_blocks
from flatkern.nn.lookup import looking_up, looks_up
from flatkern.nn.parameters import reached
from flatkern.nn.shown import showing


class Conv1DSite(ShownSite):
    """transformers' Conv1D, whose weight is [in, out]."""

    linear = True

    def _rows(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[::-1])

    def _by_row(self) -> Tensor:
        return self.weight.t().contiguous()


class EmbeddingSite(ShownSite):
    """An embedding; W' = W + s (B A)^T, a row for each token."""

    def _rows(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _factors_of(self) -> Any:
        return self.layer.lora_embedding_A

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        lora_A, lora_B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return lora_B.t(), lora_A.t(), float(layer.scaling[name])

    def _dora_operands(self, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """PEFT's magnitudes are those of the columns, over all tokens."""
        lora_A, lora_B, scaling = self._of_adapter(name)
        return self.weight.t().contiguous(), lora_B.t(), lora_A.t(), scaling

    def _base_forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        window, base = self._window, self.layer.base_layer
        noisy = window is not None and window.noisy and not self.layer.disable_adapters
        if not (noisy and looks_up(base, "weight", ids)):
            return super()._base_forward(ids, *args, **kwargs)
        if base.weight.requires_grad and torch.is_grad_enabled():
            with showing(window, base, "weight", only=ids.unique().tolist()):
                return type(base).forward(base, ids, *args, **kwargs)
        with looking_up(window, base, ids) as places:
            return type(base).forward(base, places, *args, **kwargs)


class ConvSite(ShownSite):
    """A convolution; a row is a filter, and A is a convolution with the base's kernel."""

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """As for others; besides, PEFT's branch must be a change of the weight."""
        base = layer.base_layer
        if base.groups > 1:
            return "a convolution in groups, which has no W' = W + s B A"
        kernels = zip(base.dilation, base.kernel_size, strict=True)
        if base.padding_mode != "zeros" or any(d > 1 and k > 1 for d, k in kernels):
            return "a convolution with dilation or padding that PEFT's branch has not"
        return super().why_not(layer)

    def _rows(self) -> tuple[int, ...]:
        return self.weight.shape[0], self.weight.shape[1:].numel()

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        return lora_A.flatten(1), lora_B.flatten(1), float(layer.scaling[name])

    def _by_row(self) -> Tensor:
        return self.weight.flatten(1)


class ParameterSite(ShownSite):
    """A parameter of a module under `target_parameters`: stacked experts, mostly.

    PEFT multiplies by W + s B A, which it makes for the whole stack; here W is noisy in it, and
    autograd does not keep it. Experts that no token reaches get no noise.
    """

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why no window can show the parameter, or None if one can."""
        base = layer.get_base_layer()
        reason = why_not_base(base, layer.parameter_name)
        if reason is not None:
            return reason
        weight = getattr(base, layer.parameter_name)
        if not is_plain(weight):
            return not_plain(weight)
        if transposed_blocks(base, layer.parameter_name) > 1:
            return "matrices [in, out] below one another, to which PEFT adds one product"
        if weight.dim() == 3 and weight.shape[0] == 1:
            return "a stack of one matrix, to which PEFT adds another shape"
        return why_not_variant(layer)

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        self.parameter = layer.parameter_name
        super().__init__(layer)

    @property
    def holder(self) -> nn.Module:
        """The module that has the parameter: other layers of PEFT's may stand in between."""
        return self.layer.get_base_layer()

    def _stand_in(self) -> None:
        self.layer.forward = self._forward

    def _stand_back(self) -> None:
        self.layer.__dict__.pop("forward", None)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, window = self.layer, self._window
        if layer.disable_adapters or layer.merged:
            with self._shown(()):
                return type(layer).forward(layer, x, *args, **kwargs)
        # Without noise too: PEFT's own, which registers a parametrization, leaves the module's
        # parameters in another order, by which noise is numbered.
        layer._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("peft: a parameter's layer takes no adapter_names")
        window = window if window is not None and window.noisy else None
        is_stack = window is not None and self.weight.dim() == 3
        only = reached(self.holder, len(self.weight), (x, *args), kwargs) if is_stack else None
        with showing(window, self.holder, self.parameter, only=only, then=self._adapted):
            return layer.base_layer(x, *args, **kwargs)

    def _adapted(self, weight: Tensor, part: slice) -> Tensor:
        """W + s B A of a range of matrices, in PEFT's operations."""
        layer = self.layer
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        fold = getattr(layer, "get_delta_factors", None)
        if len(names) == 1 and layer.num_experts > 1 and fold is not None:
            lhs, rhs, scaling = fold(names[0])
            with torch.autocast(weight.device.type, enabled=False):
                return torch.baddbmm(weight, lhs[part], rhs[part], alpha=scaling)
        deltas = [layer.get_delta_weight(name) for name in names]
        return weight + sum(deltas)[part] if deltas else weight

    def _is_transposed(self) -> bool:
        if self.weight.dim() == 2:
            return bool(transposed_blocks(self.holder, self.parameter))
        return is_transposed(self.holder, self.parameter)

    def _rows(self) -> tuple[int, ...]:
        *stack, rows, cols = self.weight.shape
        return (*stack, cols, rows) if self._is_transposed() else (*stack, rows, cols)

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Of a stack A [k, r, n] and B [k, m, r]."""
        layer = self.layer
        lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        scaling = float(layer.scaling[name])
        if self.weight.dim() == 2:
            factors = (lora_B.mT, lora_A.mT) if self._is_transposed() else (lora_A, lora_B)
            return *factors, scaling
        k = layer.num_experts
        lora_A = lora_A.reshape(k, -1, lora_A.shape[-1])
        lora_B = lora_B.reshape(lora_B.shape[0], -1, k).permute(2, 0, 1)
        # PEFT's A is over the last of the parameter's dimensions, or over the second.
        over_last = getattr(layer, "_did_swap_in_out_features", False)
        if over_last == self._is_transposed():
            return lora_B.mT, lora_A.mT, scaling
        return lora_A, lora_B, scaling


# By PEFT's layer over it.
_SITES: dict[type, type[ShownSite]] = {
    lora.Embedding: EmbeddingSite,
    lora.Conv2d: ConvSite,
    lora.layer.Conv1d: ConvSite,
    lora.Conv3d: ConvSite,
    lora.layer.MultiheadAttention: AttentionSite,
    lora.layer.ParamWrapper: ParameterSite,
}


def site_type(layer: nn.Module) -> type[ShownSite] | None:
    """The kind of site for a layer of PEFT's over another base than a linear layer."""
    if isinstance(layer, lora.Linear | adalora.SVDLinear):
        base = layer.base_layer
        if isinstance(base, Conv1D):
            return Conv1DSite
        # With a forward of their own; those whose weight nothing calls are spoken for.
        others = isinstance(base, nn.Linear) and type(base) not in PROJECTIONS
        return ShownSite if others and quantized.stored(base) is None else None
    return next((site for kind, site in _SITES.items() if isinstance(layer, kind)), None)
