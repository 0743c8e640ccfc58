"""Flat-LoRA: train adapters under noise on the merged weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatkern.methods.base import LossFn, Method
from flatkern.noise import WeightNoise
from flatkern.noise.schedules import Schedule
from flatkern.ops import _check


class FlatLoRA(Method):
    """min over A, B of E L(W' + e), e_ij ~ N(0, (sigma_t / sqrt(n) ||W'_i||)^2), W' = W + s B A.

    One draw per optimizer step, shared by all its micro-batches; the window is closed before the
    optimizer runs. Source: Li et al., "Flat-LoRA", 2024, equation 7.

    Attributes:
        noise: the `WeightNoise`, whose step counts optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.05,
        schedule: Schedule | None = None,
        strategy: str = "flat_lora",
        scope: str = "merged",
        mode: str = "virtual",
        seed: int = 0,
        ranks: str = "same",
    ) -> None:
        """Take a model with `LoRALinear` layers and the optimizer of its trainable parameters.

        Args:
            model, optimizer: see `Method`.
            sigma, schedule, strategy, scope, mode, seed, ranks: see `flatkern.WeightNoise`.
                0.05 to 0.15 is the paper's range for sigma; it ramps with `cosine_ramp`.

        Raises:
            TypeError, ValueError: see `Method` and `flatkern.WeightNoise`.
        """
        super().__init__(model, optimizer)
        self.noise = WeightNoise(
            model,
            sigma,
            strategy=strategy,
            scope=scope,
            mode=mode,
            schedule=schedule,
            seed=seed,
            ranks=ranks,
        )

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at W' + e."""
        with self.noise.window(micro_batches=len(batches)):
            return self.mean_gradient(loss_fn, batches)

    def state_dict(self) -> dict[str, Any]:
        """The noise's seed and step."""
        return {"noise": self.noise.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        _check.kinds("FlatLoRA", dict, state_dict=state_dict)
        if state_dict.keys() != {"noise"}:
            raise ValueError(
                f"FlatLoRA: state_dict must have the key noise, got {sorted(state_dict)}"
            )
        self.noise.load_state_dict(state_dict["noise"])
