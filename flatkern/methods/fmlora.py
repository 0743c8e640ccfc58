"""FMLoRA: SAM on the merged weights, carried out by moving B alone, or A alone."""

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._layers import Pair, lora_layers
from flatkern.ops import _check


class FMLoRA(Ascent):
    """The gradient at (A, B + E), where s E A is the part of SAM's step on W' that B can make.

    The gradient G of W' is estimated from those of A and B as H = (G P_A + P_B G) / 2, with the
    projections P_A = A^+ A and P_B = B B^+. Then E = rho H A^+ / (s ||H||), or, never forming
    m x n, with X = dB (A A')^+ and Y = (B'B)^+ dA,

        H = (X A + B Y) / (2 s),   E = rho / (2 s^2 ||H||) (X + B Y A' (A A')^+).

    Transferred to A instead, the gradient is at (A + F, B) with F = rho B^+ H / (s ||H||)
    = rho / (2 s^2 ||H||) (Y + (B'B)^+ B'X A): s B F is the part of that step that A can make, none
    at B = 0.

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
        transfer: str = "B",
        **options: Any,
    ) -> None:
        """Perturb the merged weight of every LoRALinear and PEFT LoRA layer.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0; the source uses 0.05 to 0.6.
            norm: "per_layer", one ball for each merged weight, or "joint", one for all.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            transfer: "B" or "A", which of the two is moved.
            options: `schedule` of rho, `ascents` and `seed`, see `Ascent` in _ascent.py; those of
                `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or a model
                without such layers whose A and B are trained.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        _check.one_of(type(self).__name__, ("B", "A"), transfer=transfer)
        self.transfer = transfer
        lora_layers(self, "pairs")

    def moved(self, pair: Pair) -> nn.Parameter:
        """The factor that is moved."""
        return pair.B if self.transfer == "B" else pair.A

    def pairs(self) -> dict[str, Pair]:
        """The adapters by name, those of one layer beside one another."""
        return {pair.name: pair for layer in lora_layers(self, "pairs") for pair in layer.pairs}

    def perturbed(self) -> list[nn.Parameter]:
        """Every B, or every A."""
        return [self.moved(pair) for pair in self.pairs().values()]

    def climb(self, weights: list[nn.Parameter]) -> None:
        """Add E or F to every pair that has gradients."""
        self.move_all(self.steps())

    def move_all(self, steps: dict[str, Tensor]) -> None:
        """Add to the B, or the A, of these names."""
        for number, (name, pair) in enumerate(self.pairs().items()):
            if name in steps:
                self.move(self.moved(pair), steps[name], number)

    def steps(self) -> dict[str, Tensor]:
        """E [m, r], or F [r, n], of all pairs that have gradients, by name; float32 or wider."""
        layers = [
            pairs
            for layer in lora_layers(self, "pairs")
            if (pairs := [pair for pair in layer.pairs if pair.learns])
        ]
        estimates = [_estimate(pairs, self.transfer) for pairs in layers]
        factors = self.factors([norm for _, norm in estimates])
        steps = {}
        for pairs, (directions, _), factor in zip(layers, estimates, factors, strict=True):
            for pair, direction in zip(pairs, directions, strict=True):
                wide = torch.promote_types(self.moved(pair).dtype, torch.float32)
                steps[pair.name] = (direction * factor).to(wide)
        return steps


def _estimate(pairs: list[Pair], transfer: str) -> tuple[list[Tensor], Tensor]:
    """H A^+ / s [m, r] of a layer's pairs, or B^+ H / s [r, n], and ||H||.

    In float64, because the Gram matrices square the condition number. Several active adapters are
    one: W + sum s_i B_i A_i = W + B A with the A_i below, the s_i B_i beside one another.
    """
    A = _joined([pair.A.detach() for pair in pairs], 0)
    B = _joined([pair.scaling * pair.B.detach().double() for pair in pairs], 1)
    dA = _joined([pair.A.grad for pair in pairs], 0)
    dB = _joined([pair.B.grad.double() / pair.scaling for pair in pairs], 1)
    gram_A, gram_B = A @ A.t(), B.t() @ B
    inverse_A = inverse_gram(gram_A, _like(A, pairs[0].A))
    inverse_B = inverse_gram(gram_B, _like(B, pairs[0].B))
    X, Y = dB @ inverse_A, inverse_B @ dA
    YA = Y @ A.t()
    square = (X.t() @ X * gram_A).sum() + (Y @ Y.t() * gram_B).sum() + 2 * (B.t() @ X * YA).sum()
    norm = square.clamp_min(0).sqrt() / 2
    ranks = [pair.B.shape[1] for pair in pairs]
    if transfer == "A":
        joined = (Y + inverse_B @ (B.t() @ X) @ A) / 2
        # Of B with the s in it: no more is to be divided.
        return list(joined.split(ranks, 0)) if len(pairs) > 1 else [joined], norm
    joined = (X + B @ YA @ inverse_A) / 2
    parts = joined.split(ranks, 1) if len(pairs) > 1 else [joined]
    return [part / pair.scaling for part, pair in zip(parts, pairs, strict=True)], norm


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    # Of one adapter there is nothing to join, which not every sharded tensor allows.
    return parts[0].double() if len(parts) == 1 else torch.cat([p.double() for p in parts], dim)


def _like(joined: Tensor, part: Tensor) -> Tensor:
    """The factor as it is stored, for its shape and dtype."""
    return torch.empty(joined.shape, dtype=part.dtype, device="meta")


def inverse_gram(gram: Tensor, factor: Tensor) -> Tensor:
    """(F F')^+ without what torch.linalg.pinv(F) leaves out: 0 at F = 0."""
    cutoff = (max(factor.shape) * torch.finfo(factor.dtype).eps) ** 2
    floor = gram.shape[0] * torch.finfo(gram.dtype).eps
    return torch.linalg.pinv(gram, rtol=max(cutoff, floor), hermitian=True)
