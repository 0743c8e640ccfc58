"""FMLoRA: SAM on the merged weights, carried out by moving B alone."""

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._layers import lora_layers
from flatkern.nn import LoRALinear


class FMLoRA(Ascent):
    """The gradient at (A, B + E), where s E A is the part of SAM's step on W' that B can make.

    The gradient G of W' is estimated from those of A and B as H = (G P_A + P_B G) / 2, with the
    projections P_A = A^+ A and P_B = B B^+. Then E = rho H A^+ / (s ||H||), or, never forming
    m x n, with X = dB (A A')^+ and Y = (B'B)^+ dA,

        H = (X A + B Y) / (2 s),   E = rho / (2 s^2 ||H||) (X + B Y A' (A A')^+).

    Source: the EFMLoRA paper (first titled "EFlat-LoRA"), 2025, without its elementwise sign, which
    would make every entry of the step non-negative. Costs a second pass and a copy of B.
    """

    norms = ("per_layer", "joint")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        norm: str = "per_layer",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Perturb the merged weight of every LoRALinear layer.

        Args:
            model, optimizer, options: see `Method`.
            rho: radius, finite and at least 0; the source uses 0.05 to 0.6.
            norm: "per_layer", one ball for each merged weight, or "joint", one for all.
            last_only: take the second gradient from the last micro-batch alone.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or a model
                without LoRALinear layers whose A and B are trained.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        self._layers = lora_layers(self, "lora_A", "lora_B")

    def perturbed(self) -> list[nn.Parameter]:
        """Every B."""
        return [layer.lora_B for layer in self._layers.values()]

    def climb(self, weights: list[nn.Parameter]) -> None:
        """Add E to every B that has a gradient."""
        for name, step in self.steps().items():
            self._layers[name].lora_B.detach().add_(step)

    def steps(self) -> dict[str, Tensor]:
        """E [m, r] of every layer that has gradients, by the layer's name."""
        layers = {
            name: layer for name, layer in self._layers.items() if layer.lora_B.grad is not None
        }
        estimates = [_estimate(layer) for layer in layers.values()]
        factors = self.factors([norm for _, norm in estimates])
        return {
            name: (direction * factor).to(layer.lora_B.dtype)
            for (name, layer), (direction, _), factor in zip(
                layers.items(), estimates, factors, strict=True
            )
        }


def _estimate(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """H A^+ / s [m, r], and ||H||, in float64: the Gram matrices square the condition number."""
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    dA, dB = layer.lora_A.grad.double(), layer.lora_B.grad.double()
    gram_A, gram_B = A @ A.t(), B.t() @ B
    inverse_A = _inverse(gram_A, layer.lora_A)
    X, Y = dB @ inverse_A, _inverse(gram_B, layer.lora_B) @ dA
    YA = Y @ A.t()
    square = (X.t() @ X * gram_A).sum() + (Y @ Y.t() * gram_B).sum() + 2 * (B.t() @ X * YA).sum()
    s = layer.scaling
    return (X + B @ YA @ inverse_A) / (2 * s * s), square.clamp_min(0).sqrt() / (2 * s)


def _inverse(gram: Tensor, factor: Tensor) -> Tensor:
    """(F F')^+ without what torch.linalg.pinv(F) leaves out: 0 at F = 0."""
    cutoff = (max(factor.shape) * torch.finfo(factor.dtype).eps) ** 2
    floor = gram.shape[0] * torch.finfo(gram.dtype).eps
    return torch.linalg.pinv(gram, rtol=max(cutoff, floor), hermitian=True)
