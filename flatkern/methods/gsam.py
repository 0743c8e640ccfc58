"""GSAM: SAM's gradient without what the clean gradient has across it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._contexts import still_statistics
from flatkern.methods._ranks import dense, laid_out
from flatkern.methods.base import LossFn
from flatkern.nn import shards
from flatkern.ops import _check


class GSAM(Ascent):
    """g_p - alpha g_across, where g_p is the gradient at w + e, SAM's, and g the one at w.

    g_across = g - <g, g_p> / ||g_p||^2 g_p, over all parameters together: a step against it widens
    the gap between the loss at w + e and that at w without raising the former, to first order.
    alpha = 0 is SAM. Source: Zhuang et al., "Surrogate gap minimization improves sharpness-aware
    training", 2022, algorithm 1, arXiv:2203.08065. Its radius follows the learning rate: give
    `schedule` that of the optimizer. Costs a second pass, a copy of the trained weights and a
    gradient.
    """

    several_ascents = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        alpha: float = 0.4,
        norm: str = "joint",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0.
            alpha: finite and at least 0; 0.4 in the published code's example.
            norm: "joint", one ball for all tensors, or "per_tensor", one for each.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            options: `schedule` of rho and `seed`, see `Ascent` in _ascent.py; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        _check.kinds("GSAM", (float, int), alpha=alpha)
        _check.finite("GSAM", "alpha", alpha, minimum=0.0)
        self.alpha = alpha

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """SAM's mean gradient, then without g_across."""
        with self.ascended(loss_fn, batches), still_statistics(self.model):
            weights = list(self.trainable().values())
            # Copies: what is cleared may be written again, in DDP's buckets for example.
            clean = [None if p.grad is None else dense(p.grad).clone() for p in weights]
            self.optimizer.zero_grad()
            loss = self.mean_gradient(loss_fn, batches[-1:] if self.last_only else batches)
        if self.alpha > 0:
            pairs = zip(weights, clean, strict=True)
            self._take_off([(p, g) for p, g in pairs if g is not None and p.grad is not None])
        return loss

    def _take_off(self, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        """grad <- grad - alpha (g - share grad)."""
        if not pairs:
            return
        perturbed = [dense(p.grad) for p, _ in pairs]
        device = perturbed[0].device
        products = [inner_product(g, q) for (_, g), q in zip(pairs, perturbed, strict=True)]
        inner = sum(product.to(device) for product in products)
        square = sum(inner_product(q, q).to(device) for q in perturbed)
        # Of a gradient that is 0 the share is of nothing.
        share = inner / torch.where(square == 0, 1.0, square)
        for (p, g), q in zip(pairs, perturbed, strict=True):
            # DTensors are multiplied by numbers, not by ordinary tensors.
            own = share.item() if shards.is_sharded(q) else share.to(q.device)
            grad = q - self.alpha * (g - own * q)
            p.grad = laid_out(grad.to(p.dtype), p.grad.is_sparse)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b, of complex tensors the real part's, in float32 or wider; on every rank."""
    wide = torch.promote_types(a.dtype, torch.float32)
    product = a.to(wide) * b.to(wide).conj()
    total = (product.real if product.is_complex() else product).sum()
    return total.full_tensor() if shards.is_sharded(total) else total
