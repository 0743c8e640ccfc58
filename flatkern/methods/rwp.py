"""RWP: one draw of noise on the trained weights in every step."""

from typing import Any

import torch
from torch import nn

from flatkern.methods._windowed import Windowed


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
        strategy: str = "gaussian",
        scope: str = "trainable",
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer: see `Method`.
            sigma, strategy, scope: see `flatkern.WeightNoise`.
            options: schedule, mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method` and `flatkern.WeightNoise`.
        """
        super().__init__(
            model,
            optimizer,
            sigma=sigma,
            strategy=strategy,
            scope=scope,
            **options,
        )
