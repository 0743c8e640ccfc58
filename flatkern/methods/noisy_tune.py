"""NoisyTune: uniform noise on the weights once, before the first step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._seeded import Seeded, add_uniform_, real_parts
from flatkern.methods.base import LossFn
from flatkern.nn.shards import part_of
from flatkern.ops import _check


class NoisyTune(Seeded):
    """Plain training from w + e, e_ij uniform in (-lam std(w) / 2, lam std(w) / 2), once.

    std(w) is that of all elements of a tensor. The noise stays: it is written in the first step
    that updates, and a step that fails or is skipped leaves w as it was. A resumed run does not
    write it again. Costs nothing after that step. Source: Wu et al., "NoisyTune: a little noise
    can help you finetune pretrained language models better", 2022, arXiv:2202.12024.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        lam: float = 0.15,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Choose the noise of every trainable parameter; nothing is written yet.

        Args:
            model, optimizer, options: see `Method`.
            lam: finite and at least 0; 0.1 to 0.15 in the source.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, seed=seed, **options)
        _check.kinds("NoisyTune", (float, int), lam=lam)
        _check.finite("NoisyTune", "lam", lam, minimum=0.0)
        self.lam = lam
        # Clean weights, while an update may not come about.
        self._before: list[tuple[Tensor, Tensor]] = []
        self._applied = False

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient; in the first step at w + e, which then stands in the weights."""
        self._undo()
        try:
            if not self._applied:
                self._apply()
            return self.mean_gradient(loss_fn, batches)
        except BaseException:
            self._undo()
            raise

    def _apply(self) -> None:
        held = [part_of(weight.detach()).local for weight in self.trainable().values()]
        self._before = [(local, local.clone()) for local in held]
        for weight, key in self.keyed():
            parts = real_parts(weight)
            if parts.numel():
                width = self.lam / 2 * _deviation(parts)
                add_uniform_(parts, width.to(torch.float32).expand(parts.shape[0]), key)
        torch.clear_autocast_cache()

    def _undo(self) -> None:
        for local, clean in self._before:
            local.copy_(clean)
        self._before = []

    def _unscale_and_update(self) -> None:
        try:
            super()._unscale_and_update()
        except BaseException:
            self._undo()
            raise

    def update(self) -> bool:
        """Step the optimizer; where it is not stepped, w is what it was."""
        try:
            stepped = super().update()
        except BaseException:
            self._undo()
            raise
        if stepped:
            self._applied, self._before = True, []
        else:
            self._undo()
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """The seed, the step, and whether the noise is in the weights."""
        return {"applied": self._applied, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        super().load_state_dict(state_dict)
        _check.kinds("NoisyTune", bool, applied=state_dict["applied"])
        self._applied = state_dict["applied"]


def _deviation(weight: Tensor) -> Tensor:
    """The standard deviation of all elements, of n - 1 degrees; 0 for one, of all shards."""
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
    return wide.std() if wide.numel() > 1 else wide.new_zeros(())
