"""PEFT's layers over other bases than `nn.Linear`: what a window shows of their weights.

None has a product of ours: the module's own forward runs, on a weight that is made for the call.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners import adalora, lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from flatkern.integrations._peft_sites import (
    PeftSite,
    is_plain,
    not_plain,
    why_not_base,
    why_not_variant,
)
from flatkern.nn.shown import gathered, noisy_part, shadowing, showing
from flatkern.nn.sites import mark_called
from flatkern.noise.guards import late_backward_guard
from flatkern.noise.rows import is_transposed

# What experts call their argument that says which of them get a token.
_ROUTES = ("top_k_index", "router_indices", "selected_experts")


class ShownSite(PeftSite):
    """A layer whose base forward runs as it is, on a weight that is noisy for the call."""

    takes_shards = False

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why no window can show the base weight of such a layer, or None if one can."""
        base = layer.base_layer
        reason = why_not_base(base, "weight")
        if reason is None and not is_plain(base.weight):
            reason = not_plain(base.weight)
        return reason or why_not_variant(layer)

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        super().__init__(layer)
        self.takes_shards = False

    def _base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own, on the weight as an open window shows it."""
        base = self.layer.base_layer
        with self._shown(args):
            return type(base).forward(base, *args, **kwargs)

    def _shown(self, args: tuple[Any, ...]) -> Any:
        """The weight is what a forward with these arguments is to see: clean without adapters."""
        window = self._window
        if window is None:
            return contextlib.nullcontext()
        if self.layer.disable_adapters:
            if not window.perturbed:
                return contextlib.nullcontext()
            return shadowing(self.holder, self.parameter, window.clean_weight())
        return self._shown_noisy(args) if window.noisy else contextlib.nullcontext()

    def _shown_noisy(self, args: tuple[Any, ...]) -> Any:
        return showing(self._window, self.holder, self.parameter)


class Conv1DSite(ShownSite):
    """transformers' Conv1D, whose weight is [in, out]."""

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """As for others; DoRA is one that can."""
        base = layer.base_layer
        reason = why_not_base(base, "weight")
        if reason is None and not is_plain(base.weight):
            reason = not_plain(base.weight)
        return reason or why_not_variant(layer, DoraLinearVariant)

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

    def _base_forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        window, base = self._window, self.layer.base_layer
        noisy = window is not None and window.noisy and not self.layer.disable_adapters
        # Others than these look up something else than what they are given (positions, say).
        plain = type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        if not (noisy and plain and _can_wait(ids)):
            return super()._base_forward(ids, *args, **kwargs)
        if base.weight.requires_grad and torch.is_grad_enabled():
            with showing(window, base, "weight", only=ids.unique().tolist()):
                return type(base).forward(base, ids, *args, **kwargs)
        mark_called(window)
        tokens, places = ids.unique(return_inverse=True)
        # Without a gradient of the weight, nothing asks which row is for padding.
        padding, base.padding_idx = base.padding_idx, None
        try:
            with shadowing(base, "weight", gathered(window, base.weight, tokens)):
                return type(base).forward(base, places, *args, **kwargs)
        finally:
            base.padding_idx = padding


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


class ParameterSite(ShownSite):
    """A parameter of a module under `target_parameters`: stacked experts, mostly.

    PEFT multiplies by W + s B A, which it makes for the whole stack; here W is noisy in it. Experts
    that no token reaches get no noise.
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
        if weight.dim() == 3 and weight.shape[0] == 1:
            return "a stack of one matrix, to which PEFT adds another shape"
        return why_not_variant(layer)

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        self.parameter = layer.parameter_name
        super().__init__(layer)
        names = inspect.signature(type(self.holder).forward).parameters
        self._route = next((name for name in _ROUTES if name in names), None)
        self._arguments = list(names)[1:]

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
        noisy = window is not None and window.noisy and not layer.disable_adapters
        if not noisy:
            with self._shown(()):
                return type(layer).forward(layer, x, *args, **kwargs)
        layer._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("peft: a parameter's layer takes no adapter_names")
        only = self._reached((x, *args), kwargs)
        with showing(window, self.holder, self.parameter, only=only, then=self._adapted):
            return layer.base_layer(x, *args, **kwargs)

    def _reached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """The experts that get a token, if the module is told."""
        if self._route is None or self.weight.dim() != 3:
            return None
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        route = given.get(self._route)
        if not isinstance(route, Tensor) or route.is_floating_point() or not _can_wait(route):
            return None
        # Expert parallelism has an index past the last for experts elsewhere.
        return [index for index in route.unique().tolist() if index < self.weight.shape[0]]

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
        return is_transposed(self.holder, self.parameter)

    def _rows(self) -> tuple[int, ...]:
        *stack, rows, cols = self.weight.shape
        return (*stack, cols, rows) if stack and self._is_transposed() else (*stack, rows, cols)

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Of a stack A [k, r, n] and B [k, m, r]."""
        layer = self.layer
        lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        scaling = float(layer.scaling[name])
        if self.weight.dim() == 2:
            return lora_A, lora_B, scaling
        k = layer.num_experts
        lora_A = lora_A.reshape(k, -1, lora_A.shape[-1])
        lora_B = lora_B.reshape(lora_B.shape[0], -1, k).permute(2, 0, 1)
        # PEFT's in and out are those of the module if that says `is_transposed`, else the second
        # and first of the matrices as they lie.
        as_it_lies = bool(layer._did_swap_in_out_features)
        if as_it_lies and self._is_transposed():
            return lora_B.mT, lora_A.mT, scaling
        return lora_A, lora_B, scaling


class _MergedSite(ShownSite):
    """A weight into which PEFT merges its adapters for each forward, which counts as no merge."""

    def __init__(self, layer: nn.Module) -> None:
        """A layer that can be attached to."""
        self.in_forward = False
        super().__init__(layer)

    def _rows(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _require_hidden(self, action: str) -> None:
        if not self.in_forward:
            super()._require_hidden(action)

    def _copied(self) -> Callable[[], None]:
        """PEFT's merge leaves the parameters as they are, and takes others."""
        return lambda: None

    def shown_weight(self) -> Tensor | None:
        """What stands in the parameter's place for a forward; None: the parameter itself."""
        window = self._window
        if window is None:
            return None
        if self.layer.disable_adapters:
            return window.clean_weight() if window.perturbed else None
        if not window.noisy:
            return None
        mark_called(window)
        return noisy_part(window, self.weight, slice(0, self.weight.shape[0]))


class AttentionSite(_MergedSite):
    """nn.MultiheadAttention: in_proj_weight; `out_proj` is a layer of PEFT's inside it.

    PEFT merges both before each forward, and takes the adapters out again, which rounds: here the
    parameters are put back instead, the same objects with the same bits.
    """

    parameter = "in_proj_weight"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why no window can show the two weights of such a layer, or None if one can."""
        base = layer.base_layer
        reason = why_not_base(base, "in_proj_weight")
        out = base.out_proj
        if reason is None and type(getattr(out, "base_layer", None)) not in _PROJECTIONS:
            reason = "attention whose out_proj is no linear layer"
        for weight in (base.in_proj_weight, out.weight) if reason is None else ():
            reason = reason or (None if is_plain(weight) else not_plain(weight))
        return reason or why_not_variant(layer) or why_not_variant(out)

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        layer.named_modules = self._named_modules
        layer.state_dict = self._state_dict
        self.layer = layer
        for module, name in ((layer.base_layer, "in_proj_weight"), (self._out, "weight")):
            _put(module, name, module._parameters[name])
        # What PEFT's merge replaces.
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        super().__init__(layer)
        self._projection = ProjectionSite(layer.base_layer.out_proj)

    @property
    def _out(self) -> nn.Module:
        return self.layer.base_layer.out_proj.base_layer

    def _stand_in(self) -> None:
        self.layer.forward = self._forward

    def _stand_back(self) -> None:
        for name in ("forward", "named_modules", "state_dict"):
            self.layer.__dict__.pop(name, None)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer.merged:
            return type(layer).forward(layer, *args, **kwargs)
        sites = self, self._projection
        self._keep()
        try:
            for site in sites:
                site.in_forward = True
                shown = site.shown_weight()
                if shown is not None:
                    site.holder.__dict__[site.parameter] = shown
            result = type(layer).forward(layer, *args, **kwargs)
        finally:
            for site in sites:
                site.in_forward = False
            self._put_kept()
        window = self._window
        if window is not None and (window.noisy or window.perturbed):
            # The merged weights are the graph's own, so autograd would notice nothing.
            late_backward_guard(window.name, window.key)(layer, args, tree_leaves(result))
        return result

    def _merge(self, *args: Any, **kwargs: Any) -> None:
        if not (self.layer.merged or self.in_forward):
            self._keep()
        super()._merge(*args, **kwargs)

    def _unmerge(self) -> None:
        super()._unmerge()
        if not self.in_forward:
            self._put_kept()

    def _keep(self) -> None:
        sites = self, self._projection
        self._kept = [(site.holder, site.parameter, site.weight) for site in sites]

    def _put_kept(self) -> None:
        """The parameters themselves, in the place of what PEFT made of them."""
        for module, name, parameter in self._kept:
            module.__dict__.pop(name, None)
            _put(module, name, parameter)
        self._kept = []

    def _named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """PEFT's makes new parameters; here they are where they belong, unless merged."""
        layer = self.layer
        own = type(layer).named_modules if layer.merged else nn.Module.named_modules
        return own(layer, *args, **kwargs)

    def _state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        layer = self.layer
        own = type(layer).state_dict if layer.merged else nn.Module.state_dict
        return own(layer, *args, **kwargs)

    def detach(self) -> None:
        """Leave both layers as they were."""
        self._projection.detach()
        super().detach()


class ProjectionSite(_MergedSite):
    """The out_proj of an attention, whose forward nothing calls: `AttentionSite` shows it."""

    def _stand_in(self) -> None:
        """The attention's stands there."""

    def _stand_back(self) -> None:
        """The attention's does."""

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        lora_A, lora_B, scaling = super()._of_adapter(name)
        return lora_A, lora_B, scaling * _times_merged()


_PROJECTIONS = (nn.Linear, NonDynamicallyQuantizableLinear)
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
        return Conv1DSite if isinstance(layer.base_layer, Conv1D) else None
    return next((site for kind, site in _SITES.items() if isinstance(layer, kind)), None)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Have the parameter where the module's constructor puts it: before all others."""
    own = module._parameters
    if own.get(name) is parameter and next(iter(own)) == name:
        return
    own.pop(name, None)
    rest = dict(own)
    own.clear()
    own[name] = parameter
    own.update(rest)


def _can_wait(tensor: Tensor) -> bool:
    """Whether the host may look inside a tensor at this time."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


@functools.cache
def _times_merged() -> float:
    """How often a forward of PEFT's MultiheadAttention adds the adapter of out_proj.

    Twice in versions up to 0.21: it merges by itself and through the layer. W' is what it multiplies by.
    """
    with torch.random.fork_rng(devices=[]):
        attention = nn.MultiheadAttention(1, 1, device="cpu")
        layer = lora.layer.MultiheadAttention(attention, "a", lora.LoraConfig(), r=1, lora_alpha=1)
    out = layer.base_layer.out_proj
    with torch.no_grad():
        for part in (out.base_layer.weight, out.lora_A["a"].weight, out.lora_B["a"].weight):
            part.fill_(1.0)
        layer.merge()
        return float(F.relu(out.base_layer.weight - 1.0).sum())
