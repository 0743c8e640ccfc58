"""Adapters that can be written into their weight, and taken out again to the bit."""

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.sites import CLOSE_FIRST


class Mergeable(nn.Module):
    """A module with an adapter over `weight`, which it can write there.

    Attributes:
        merged: whether `weight` holds W + s B A at the moment.
    """

    weight: Tensor
    _clean_weight: Tensor | None

    def _start_unmerged(self) -> None:
        # The weight's clean bits while it is merged; moves with the module, is never saved.
        self.register_buffer("_clean_weight", None, persistent=False)
        # What this layer sees of an open window (`noise.state.State`): a plain object, so that
        # no Module.to casts it and no state_dict names it.
        self._window: Any = None

    def _merge(self, clean: Tensor) -> Tensor:
        """W + s B A, not yet rounded to the weight's dtype."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + s B A at the moment."""
        return self._buffers["_clean_weight"] is not None

    def merged_weight(self) -> Tensor:
        """W + s B A of the clean W, in the weight's dtype, rounded once; a new tensor."""
        clean = self._clean_weight if self.merged else self.weight
        if self._window is not None and not self.merged:
            clean = self._window.clean_weight()
        with torch.no_grad(), torch.autocast(clean.device.type, enabled=False):
            return self._merge(clean).to(clean.dtype)

    def merge(self) -> None:
        """Write W + s B A into `weight`; nothing happens if it is there already.

        The clean bits are kept beside it until `unmerge`: one more copy of the weight. While
        merged the adapters are not used, `state_dict` gives the clean weight, and loading one is
        refused. Whatever else reads the same weight (a tied one) sees W + s B A too.

        Raises:
            RuntimeError: a window of `WeightNoise` is open, and not paused.
        """
        self._require_clean("merge")
        if not self.merged:
            merged = self.merged_weight()
            self._clean_weight = self.weight.detach().clone()
            with torch.no_grad():
                self.weight.copy_(merged)

    def unmerge(self) -> None:
        """Put the exact bits of the clean weight back; nothing happens if it is not merged.

        Raises:
            RuntimeError: a window of `WeightNoise` is open, and not paused.
        """
        self._require_clean("unmerge")
        if self.merged:
            with torch.no_grad():
                self.weight.copy_(self._clean_weight)
            self._clean_weight = None

    def enter_window(self, window: Any) -> None:
        """Belong to the window that is being opened; the weight is clean at this time."""
        # Not through Module.__setattr__: a window sets it on every layer.
        self.__dict__["_window"] = window

    def require_closed(self, action: str) -> None:
        """RuntimeError while a window of `WeightNoise` is open, paused or not."""
        if self._window is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {action} inside a noise window; {CLOSE_FIRST}"
            )

    def _require_clean(self, action: str) -> None:
        """RuntimeError where a window shows noise, or has it written in the weight."""
        window = self._window
        if window is not None and (window.noisy or window.perturbed):
            raise RuntimeError(
                f"{type(self).__name__}: {action} inside a noise window; "
                f"use paused(), or {CLOSE_FIRST}"
            )

    def _require_unmerged(self, weight: str) -> None:
        """RuntimeError if a state_dict is being loaded over the merged weight."""
        if self.merged:
            raise RuntimeError(
                f"{type(self).__name__}: load_state_dict into {weight}, which is merged; "
                "call unmerge() first"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has no part in an open window."""
        return self.__dict__ | {"_window": None}
