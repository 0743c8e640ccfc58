"""RWP: one draw of noise on the trained weights in every step."""

from typing import Any

import torch
from torch import nn

from flatkern.methods._windowed import Windowed
from flatkern.noise.schedules import Schedule


class RWP(Windowed):
    """The gradient of a single sample of E L(w + e), e_j ~ N(0, S_j^2).

    To second order E L(w + e) = L(w) + 1/2 sum_j S_j^2 H_jj. One draw per optimizer step, removed
    before the update. Source: Li et al., "Efficient generalization improvement guided by random
    weight perturbation", 2022, with S = sigma; their code has sigma ||w_i||, strategy "row".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.0015,
        schedule: Schedule | None = None,
        strategy: str = "gaussian",
        scope: str = "trainable",
        mode: str = "virtual",
        seed: int = 0,
        ranks: str = "same",
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer, options: see `Method`.
            sigma, schedule, strategy, scope, mode, seed, ranks: see `flatkern.WeightNoise`.

        Raises:
            TypeError, ValueError: see `Method` and `flatkern.WeightNoise`.
        """
        super().__init__(
            model,
            optimizer,
            sigma=sigma,
            schedule=schedule,
            strategy=strategy,
            scope=scope,
            mode=mode,
            seed=seed,
            ranks=ranks,
            **options,
        )
