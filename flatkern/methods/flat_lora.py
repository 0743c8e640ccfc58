"""Flat-LoRA: train adapters under noise on the merged weights."""

from typing import Any

import torch
from torch import nn

from flatkern.methods._windowed import Windowed


class FlatLoRA(Windowed):
    """min over A, B of E L(W' + e), e_ij ~ N(0, (sigma_t / sqrt(n) ||W'_i||)^2), W' = W + s B A.

    One draw per optimizer step, shared by all its micro-batches; the window is closed before the
    optimizer runs. Its ablations are the scopes "lora", A and B alone, and "all", W' and vectors.
    Source: Li et al., "Flat-LoRA", 2024, equation 7.

    Attributes:
        noise: the `WeightNoise`, whose step counts optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.05,
        strategy: str = "flat_lora",
        scope: str = "merged",
        **options: Any,
    ) -> None:
        """Take a model with `LoRALinear` layers and the optimizer of its trainable parameters.

        Args:
            model, optimizer: see `Method`.
            sigma, strategy, scope: see `flatkern.WeightNoise`.
                0.05 to 0.15 is the paper's range for sigma, reached by a ramp, which is passed:
                `schedule=flatkern.cosine_ramp(total_steps)`.
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
