"""EFMLoRA: FMLoRA in one pass, at a running mean of earlier steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatkern.methods._contexts import kept
from flatkern.methods._means import mean_of_state
from flatkern.methods.base import LossFn
from flatkern.methods.fmlora import FMLoRA
from flatkern.ops import _check


class EFMLoRA(FMLoRA):
    """The gradient at (A, B + M_(t-1)), where M_t = (1 - beta) M_(t-1) + beta E_t and M_1 = E_1.

    E_t is FMLoRA's step from that same gradient, at the point where it was taken; the first step's
    gradient is plain. B itself is what is updated, evaluated and saved; the source's algorithm
    ends a step at B + M. Costs M and a copy of B, and no pass. Source: see `FMLoRA`.
    """

    several_ascents, one_batch = False, False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        beta: float = 0.9,
        norm: str = "per_layer",
        **options: Any,
    ) -> None:
        """Perturb the merged weight of every LoRALinear and PEFT LoRA layer.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0.
            beta: weight of the newest step, in (0, 1]; 1 is FMLoRA with the last step's E.
            norm: "per_layer", one ball for each merged weight, or "joint", one for all.
            options: `transfer` as in `FMLoRA`; `schedule` of rho and `seed`, see `Ascent` in
                _ascent.py; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or a model
                without such layers.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, **options)
        _check.kinds("EFMLoRA", (float, int), beta=beta)
        if not 0 < beta <= 1:
            _check.refuse("EFMLoRA", "beta", "in (0, 1]", beta)
        self.beta = beta
        self._mean: dict[str, torch.Tensor] = {}
        self._next_mean = self._mean

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at B + M; the next M waits for the update."""
        weights = self.perturbed()
        with kept(weights) as before:
            self.move_all(self._mean)
            if self._mean:
                self.tell(weights, before)
            loss = self.mean_gradient(loss_fn, batches)
            self._next_mean = {**self._mean, **self._mixed(self.steps())}
        return loss

    def _mixed(self, steps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.lerp(self._mean[name], step, self.beta) if name in self._mean else step
            for name, step in steps.items()
        }

    def update(self) -> bool:
        """Step the optimizer, and with it M."""
        stepped = super().update()
        if stepped:
            self._mean = self._next_mean
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """M of every layer, by its name, none before the first update; seed and step as in SAM."""
        mean = {name: step.clone() for name, step in self._mean.items()}
        return {"mean": mean, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        weights = {name: self.moved(pair) for name, pair in self.pairs().items()}
        mean = mean_of_state("EFMLoRA", state_dict, weights, f"of the layers {list(weights)}")
        super().load_state_dict(state_dict)
        self._mean = mean
