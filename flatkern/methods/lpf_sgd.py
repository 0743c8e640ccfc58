"""LPF-SGD: descent on the loss smoothed by a Gaussian."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatkern.methods._windowed import Windowed
from flatkern.methods.base import LossFn
from flatkern.noise.schedules import Schedule, lpf


class LPFSGD(Windowed):
    """The mean over M micro-batches of gradients at w + e_k, each with a draw of its own.

    e_k,ij ~ N(0, (sigma_t ||w_i||)^2); a vector counts as one row. sigma_t is constant, or grows
    to (1 + alpha) sigma over `total_steps`. Of P ranks under DDP, rank r has the draws k P + r:
    what one process has that takes the ranks' k-th micro-batches one after the other. Source:
    Bisla et al., "Low-pass filtering SGD", 2022, with the standard deviation of its code.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 5e-4,
        alpha: float = 15.0,
        total_steps: int | None = None,
        schedule: Schedule | None = None,
        strategy: str = "row",
        scope: str = "trainable",
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer: see `Method`.
            sigma: strength at the start; the published code has M = 8 with 5e-4, M = 1 with 2e-3.
            alpha, total_steps: of `flatkern.lpf`, the schedule if `total_steps` is given.
            schedule: instead of those; None without `total_steps`: constant.
            strategy, scope: see `flatkern.WeightNoise`.
            options: mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`, `flatkern.lpf` and `flatkern.WeightNoise`; both a
                schedule and `total_steps`.
        """
        ramp = lpf(1 if total_steps is None else total_steps, alpha)
        if total_steps is not None:
            if schedule is not None:
                raise ValueError("LPFSGD: total_steps must be None beside a schedule, got both")
            schedule = ramp
        super().__init__(
            model,
            optimizer,
            sigma=sigma,
            schedule=schedule,
            strategy=strategy,
            scope=scope,
            **options,
        )

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient, micro-batch k at w + e_k; its number is the draw of its key."""
        total = 0.0
        # Shards of a weight on several ranks are of one draw.
        size, rank = (self.ranks.size, self.ranks.rank) if self.ranks.whole else (1, 0)
        for index in range(len(batches)):
            # The last window ends the step.
            last = index + 1 == len(batches)
            with self.window(None if last else self.noise.step, index * size + rank):
                total = total + self.add_gradient(loss_fn, batches, index)
        return self.mean_number(total, len(batches))
