"""LoRA-SAM: SAM on the adapters."""

from typing import Any

import torch
from torch import nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._layers import lora_layers


class LoRASAM(Ascent):
    """The gradient at A + c dA and B + c dB, where dA, dB are the gradients at A and B.

    c = rho / sqrt(sum over layers of ||dA||^2 + ||dB||^2). To the merged weight this adds
    s^2 c (G A'A + B B'G) + s^3 c^2 G A'B'G, where G is its gradient; at B = 0 A stays. Other
    trainable parameters are trained and not perturbed. Source: Li et al., "Implicit
    regularization of sharpness-aware minimization for scale-invariant problems", 2024.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.003,
        norm: str = "joint",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Perturb the adapters of every LoRALinear and PEFT LoRA layer.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0: 0.003 (Flat-LoRA's comparison), 0.05 to 0.2 (BAR's).
            norm: "joint", one ball for all tensors, or "per_tensor", one for each.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            options: `schedule` of rho, `ascents` and `seed`, see `Ascent` in _ascent.py; those of
                `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or a model
                without LoRALinear layers.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        lora_layers(self, "adapters")

    def perturbed(self) -> list[nn.Parameter]:
        """The adapters that are trained."""
        return [part for layer in lora_layers(self, "adapters") for part in layer.adapters]
