"""GAM: descent on the loss and on the largest gradient nearby."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._contexts import kept, still_statistics
from flatkern.methods._ranks import dense, laid_out
from flatkern.methods.base import LossFn
from flatkern.ops import _check


class GAM(Ascent):
    """g + alpha h, where h = rho grad ||grad L|| at the point of a ball where it is about largest.

    That point is w + rho f / ||f|| with f = grad ||grad L|| at w, and grad ||grad L|| = H g / ||g||
    is the difference quotient (grad L(v + delta g / ||g||) - grad L(v)) / delta, as in the source's
    appendix D: exact where the loss is quadratic. alpha = 0 is plain training. Batch norms count
    the first pass alone. Source: Zhang et al., "Gradient norm aware minimization seeks first-order
    flatness", 2023, equations 7 and 8, arXiv:2303.03108; its published code has an accelerated form
    with other mixtures of these four gradients. Costs three more passes, two copies of the trained
    weights and two gradients.
    """

    norms = ("joint",)
    several_ascents, one_batch = False, False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.2,
        alpha: float = 0.1,
        delta: float = 0.02,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0.
            alpha: weight of the largest gradient, finite and at least 0; the source tunes it.
            delta: length of the difference, finite and above 0.
            options: `schedule` of rho and `seed`, see `Ascent` in _ascent.py; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        options.setdefault("norm", "joint")
        super().__init__(model, optimizer, rho=rho, **options)
        _check.kinds("GAM", (float, int), alpha=alpha, delta=delta)
        _check.finite("GAM", "alpha", alpha, minimum=0.0)
        _check.finite("GAM", "delta", delta, minimum=0.0)
        if delta == 0:
            _check.refuse("GAM", "delta", "above 0", delta)
        self.alpha, self.delta = alpha, delta

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient, and alpha h; the loss is that at w."""
        loss = self.mean_gradient(loss_fn, batches)
        factor = self.alpha * self.rho_t / self.delta
        weights = [p for p in self.trainable().values() if p.grad is not None]
        if factor == 0:
            return loss
        clean, sparse = self._gradients(weights), [p.grad.is_sparse for p in weights]
        with still_statistics(self.model):
            ahead = self._gradients_at(loss_fn, batches, weights, clean, self.delta)
            f = [a - g for a, g in zip(ahead, clean, strict=True)]
            with self._moved(weights, f, self.rho_t, 1):
                near = self._again(loss_fn, batches, weights)
                far = self._gradients_at(loss_fn, batches, weights, near, self.delta)
        for p, g, n, m, is_sparse in zip(weights, clean, near, far, sparse, strict=True):
            p.grad = laid_out((g + factor * (m - n)).to(p.dtype), is_sparse)
        return loss

    def _gradients_at(
        self,
        loss_fn: LossFn,
        batches: Sequence[Any],
        weights: list[nn.Parameter],
        way: list[Tensor],
        length: float,
    ) -> list[Tensor]:
        """The mean gradients this far along a way."""
        with self._moved(weights, way, length, self._ascent + 2):
            return self._again(loss_fn, batches, weights)

    @contextlib.contextmanager
    def _moved(
        self, weights: list[nn.Parameter], way: list[Tensor], length: float, ascent: int
    ) -> Iterator[None]:
        with kept(weights) as before:
            self._ascent = ascent
            self.climb_along(weights, way, length)
            self.tell(weights, before)
            try:
                yield
            finally:
                self._ascent = 0

    def _again(
        self, loss_fn: LossFn, batches: Sequence[Any], weights: list[nn.Parameter]
    ) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.mean_gradient(loss_fn, batches)
        return self._gradients(weights)

    def _gradients(self, weights: list[nn.Parameter]) -> list[Tensor]:
        """Copies, wide; 0 where there is none."""
        wide = [torch.promote_types(p.dtype, torch.float32) for p in weights]
        return [
            torch.zeros_like(p, dtype=dtype)
            if p.grad is None
            else dense(p.grad).to(dtype, copy=True)
            for p, dtype in zip(weights, wide, strict=True)
        ]
