"""Entropy-SGD: descent on the local entropy, by a short Langevin walk around the weights."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods import _rounding
from flatkern.methods._contexts import kept, still_statistics
from flatkern.methods._ranks import dense
from flatkern.methods._seeded import Seeded, check_above_zero, normals_like
from flatkern.methods.base import LossFn
from flatkern.noise import NoiseKey
from flatkern.noise.schedules import Schedule, factor_at, schedule_of
from flatkern.ops import _check


class EntropySGD(Seeded):
    """g = gamma (w - m), with m the running mean of a walk of K steps that starts at v = w:

        v <- v - r (grad L(v) + gamma (v - w)) + sqrt(r) sigma z,   m <- (1 - alpha) m + alpha v.

    Every step of the walk takes the mean gradient over all micro-batches, and normals of its own. A
    learning rate of 1 / gamma sets w to m; K = 1 without noise is gamma alpha r times the plain
    gradient. Batch norms count the first pass alone; w comes back bit for bit before the update,
    and in 16 bits v is rounded at random. Costs K passes, two copies of the trained weights and m.
    Source: Chaudhari et al., "Entropy-SGD: biasing gradient descent into wide valleys", 2017,
    algorithm 1, arXiv:1611.01838.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 1.0,
        inner_steps: int = 20,
        inner_lr: float = 0.1,
        alpha: float = 0.75,
        sigma: float = 1e-4,
        schedule: Schedule | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Choose the walk.

        Args:
            model, optimizer, options: see `Method`.
            gamma: how strongly the walk is held to w, finite and above 0. The source lets it grow
                from 1e-4, with a learning rate that makes up for it.
            inner_steps: K, at least 1.
            inner_lr: r, finite and above 0.
            alpha: weight of the newest v in m, in (0, 1].
            sigma: of the noise, finite and at least 0: the source's epsilon.
            schedule: factor of gamma as a function of the 0-based step (scoping), above 0; None:
                constant.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, seed=seed, **options)
        check_above_zero("EntropySGD", gamma=gamma, inner_lr=inner_lr)
        _check.kinds("EntropySGD", int, inner_steps=inner_steps)
        if inner_steps < 1:
            _check.refuse("EntropySGD", "inner_steps", "at least 1", inner_steps)
        _check.kinds("EntropySGD", (float, int), alpha=alpha, sigma=sigma)
        if not 0 < alpha <= 1:
            _check.refuse("EntropySGD", "alpha", "in (0, 1]", alpha)
        _check.finite("EntropySGD", "sigma", sigma, minimum=0.0)
        self.gamma, self.inner_steps, self.inner_lr = gamma, inner_steps, inner_lr
        self.alpha, self.sigma = alpha, sigma
        self._schedule = schedule_of("EntropySGD", schedule)

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Write gamma (w - m) into `.grad`; the loss is the mean over the walk."""
        gamma = self.gamma * factor_at("EntropySGD", self._schedule, self._step)
        weights = [weight for weight, _ in self.keyed()]
        start = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in weights
        ]
        means = [w.clone() for w in start]
        walked, total = set(), 0.0
        with kept(weights), contextlib.ExitStack() as still:
            for index in range(self.inner_steps):
                total += self.mean_gradient(loss_fn, batches)
                if index == 0:
                    still.enter_context(still_statistics(self.model))
                for number, (p, key) in enumerate(self.keyed(2 * index)):
                    if p.grad is not None:
                        walked.add(number)
                        self._walk(p, key, start[number], gamma)
                        means[number].mul_(1 - self.alpha).add_(p.detach(), alpha=self.alpha)
                self.optimizer.zero_grad()
                torch.clear_autocast_cache()
        for number in sorted(walked):
            p = weights[number]
            p.grad = self.scaled(gamma * (start[number] - means[number])).to(p.dtype)
        return total / self.inner_steps

    def _walk(self, p: nn.Parameter, key: NoiseKey, start: Tensor, gamma: float) -> None:
        """A step of the walk."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        v = p.detach().to(start.dtype)
        step = (dense(p.grad).to(start.dtype) / scale + gamma * (v - start)) * -self.inner_lr
        if self.sigma > 0:
            step = step + normals_like(p, key).to(step.dtype) * (self.inner_lr**0.5 * self.sigma)
        # The rounding's words are not those of the noise.
        _rounding.add_(p.detach(), step, replace(key, draw=key.draw + 1))
