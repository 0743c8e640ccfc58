"""ARWP: less noise on rows whose gradients have been large."""

from typing import Any

import torch
from torch import nn

from flatkern.methods._windowed import Windowed
from flatkern.noise import Fisher


class ARWP(Windowed):
    """The gradient at w + e, e_ij ~ N(0, S_i^2), S_i = sigma ||w_i|| / sqrt(1 + eta F_i).

    F_i <- beta F_i + sum_j g_ij^2, with g the mean gradient at w + e; F is absent in the first
    step, and [m] numbers a weight. A vector counts as one row of the noise, and its F is its
    elements'. Frozen weights of LoRALinear layers, and of PEFT's attached ones, in scope take g
    from their inputs and output gradients: of W, which for DoRA is mu / ||V|| times that of W', as
    if without dropout. With several ranks g is the mean over all. The mixed form, mARWP, is
    `MixedRWP(strategy="fisher")`. Source: Li et al., "Revisiting random weight perturbation", 2024;
    its code starts from sigma = 1e-3 and has `flatkern.lpf(total_steps, 10)` for a schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 1e-3,
        eta: float = 0.1,
        beta: float = 0.99,
        strategy: str = "fisher",
        scope: str = "trainable",
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer: see `Method`.
            sigma, strategy, scope: see `flatkern.WeightNoise`; strategy must be "fisher".
            eta, beta: see `flatkern.Fisher`.
            options: schedule, mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`, `flatkern.WeightNoise` and `flatkern.Fisher`; a
                scope of frozen weights outside such layers.
        """
        super().__init__(
            model,
            optimizer,
            sigma=sigma,
            strategy=strategy,
            scope=scope,
            fisher=Fisher(eta, beta),
            **options,
        )
