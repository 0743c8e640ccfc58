"""PEFT's layers whose base forward runs as it is, on a weight that a window makes for the call."""

import contextlib
from typing import Any

from torch import nn

from flatkern.integrations._peft_reasons import is_plain, not_plain, why_not_base, why_not_variant
from flatkern.integrations._peft_sites import PeftSite
from flatkern.nn.shown import shadowing, showing


class ShownSite(PeftSite):
    """A layer whose base forward runs as it is, on a weight that is noisy for the call."""

    linear = False

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Why no window can show the base weight of such a layer, or None if one can."""
        base = layer.base_layer
        reason = why_not_base(base, "weight")
        if reason is None and not is_plain(base.weight):
            reason = not_plain(base.weight)
        if reason is None and isinstance(base, nn.Linear):
            # Another shape is that of something packed.
            as_said = base.weight.shape == (base.out_features, base.in_features)
            reason = None if as_said else f"base layer {type(base).__name__}"
        return reason or why_not_variant(layer)

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
