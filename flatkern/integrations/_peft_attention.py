"""PEFT's layer over nn.MultiheadAttention, which merges before each forward."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_leaves

from flatkern._interrupts import twice
from flatkern.integrations._peft_reasons import is_plain, not_plain, why_not_base, why_not_variant
from flatkern.integrations._peft_shown import ShownSite
from flatkern.nn.shown import noisy_part
from flatkern.noise.guards import late_backward_guard

PROJECTIONS = (nn.Linear, NonDynamicallyQuantizableLinear)


class _MergedSite(ShownSite):
    """A weight into which PEFT merges its adapters for each forward, which counts as no merge."""

    def __init__(self, layer: nn.Module) -> None:
        """A layer that can be attached to."""
        self.in_forward = False
        super().__init__(layer)
        # PEFT's forward makes new parameters, which FSDP does not know.
        self.takes_shards = False

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
        window.mark_called()
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
        if reason is None and type(getattr(out, "base_layer", None)) not in PROJECTIONS:
            reason = "attention whose out_proj is no linear layer"
        for weight in (base.in_proj_weight, out.weight) if reason is None else ():
            reason = reason or (None if is_plain(weight) else not_plain(weight))
        return reason or why_not_variant(layer) or why_not_variant(out)

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        self.layer = layer
        for module, name in ((layer.base_layer, "in_proj_weight"), (self._out, "weight")):
            _put(module, name, module._parameters[name])
        # What PEFT's merge replaces.
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._projection = ProjectionSite(layer.base_layer.out_proj)
        super().__init__(layer)

    @property
    def _out(self) -> nn.Module:
        return self.layer.base_layer.out_proj.base_layer

    def _stand_in(self) -> None:
        layer = self.layer
        layer.forward, layer.named_modules = self._forward, self._named_modules
        layer.state_dict = self._state_dict

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
            twice(self._leave_forward)
        window = self._window
        if window is not None and (window.noisy or window.perturbed):
            # The merged weights are the graph's own, so autograd would notice nothing.
            late_backward_guard(window.target.name, window.key)(layer, args, tree_leaves(result))
        return result

    def _leave_forward(self) -> None:
        for site in (self, self._projection):
            site.in_forward = False
        self._put_kept()

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


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Have the parameter where the module's constructor puts it: before all others."""
    own = module._parameters
    if own.get(name) is parameter and next(iter(own)) == name:
        return
    # At once: an interrupt between two changes of `own` would lose a parameter.
    module.__dict__["_parameters"] = {name: parameter} | {k: own[k] for k in own if k != name}


@functools.cache
def _times_merged() -> float:
    """How often a forward of PEFT's MultiheadAttention adds the adapter of out_proj.

    Twice in versions up to 0.21: it merges by itself, and through the layer. W' is what the forward
    multiplies by.
    """
    config = lora.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1, device="cpu")), config)
    layer = model.base_model.model[0]
    out = layer.base_layer.out_proj
    with torch.no_grad():
        for part in (out.lora_A["default"].weight, out.lora_B["default"].weight):
            part.fill_(1.0)
        clean = out.base_layer.weight.clone()
        layer.merge()
        return round(float(out.base_layer.weight - clean))
