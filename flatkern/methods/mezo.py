"""MeZO: gradients from two forwards and no backward."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern.methods import _rounding
from flatkern.methods._contexts import kept
from flatkern.methods._seeded import Seeded, check_above_zero, real_parts
from flatkern.methods.base import LossFn
from flatkern.nn.calibration import evaluating


class ForwardOnly(Seeded):
    """A sum of z_k, each times a number, with z_k ~ N(0, 1) for every trainable w: no backward.

    z_k is regenerated from (seed, step, k, tensor) for each use, and w comes back bit for bit. The
    forwards run in eval mode, because two dropout masks would differ by more than the noise does.
    With several ranks a loss is that of all their batches.
    """

    # What the noise's size is called.
    distance = "mu"

    def loss_at(
        self, distance: float, loss_fn: LossFn, batches: Sequence[Any], draw: int = 0
    ) -> Tensor:
        """The mean loss at w + distance z_draw."""
        weights = list(self.trainable().values())
        with kept(weights) as before:
            for weight, key in self.keyed(draw):
                if weight.numel():
                    ops.perturb_(*_operands(weight, distance), key.to(weight.device))
            if not self._told:
                self._told = True
                _rounding.tell_of_moved(type(self).__name__, weights, before, self.distance)
            return self.mean_loss(loss_fn, batches)

    def write(self, numbers: Sequence[Tensor]) -> None:
        """Let `.grad` be the sum of z_k times the k-th number."""
        numbers = [self.scaled(number) for number in numbers]
        for weight, key in self.keyed():
            total = None
            for draw, number in enumerate(numbers):
                z = _noise(weight, replace(key, draw=draw).to(weight.device))
                term = z.mul_(number.to(z.device))
                total = term if total is None else total.add_(term)
            grad = total.to(real_parts(weight).dtype)
            # Of a weight without dimensions it has one.
            grad = torch.view_as_complex(grad) if weight.is_complex() else grad
            weight.grad = grad.view(weight.shape)


class MeZO(ForwardOnly):
    """g = p z with p = (L(w + mu z) - L(w - mu z)) / (2 mu), z ~ N(0, 1) for every trainable w.

    z is regenerated from (seed, step, tensor) for each use and no global generator is read; w
    comes back bit for bit. The forwards run in eval mode, as in the published code, because two
    dropout masks would differ by more than mu does. The optimizer takes p z from `.grad`; with
    several ranks p is that of all their batches. A complex weight is its real and imaginary parts.
    Costs two forwards and a copy of the trainable weights. Source: Malladi et al., "Fine-tuning
    language models with just forward passes", 2023, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mu: float = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Choose the distance of the two points.

        Args:
            model, optimizer, options: see `Method`.
            mu: finite and above 0: 1e-3 for whole models, 1e-2 for adapters in the published code.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, seed=seed, **options)
        check_above_zero("MeZO", mu=mu)
        self.mu = mu

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Write p z into `.grad`; the loss is the mean of those at the two points."""
        with evaluating(self.model):
            plus = self.loss_at(self.mu, loss_fn, batches)
            minus = self.loss_at(-self.mu, loss_fn, batches)
        self.write([(plus - minus) / (2 * self.mu)])
        return float((plus + minus) / 2)


def _operands(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The weight as the ops see it, and a row scale."""
    weight = real_parts(weight)
    like = {"dtype": torch.float32, "device": weight.device}
    return weight, torch.full(weight.shape[:1], scale, **like)


def _noise(weight: Tensor, key: Tensor) -> Tensor:
    """z, from the implementation that perturbs the weight."""
    parts = real_parts(weight)
    wide = torch.zeros_like(parts, dtype=torch.promote_types(parts.dtype, torch.float32))
    if wide.numel():
        ops.perturb_(*_operands(wide, 1.0), key)
    return wide
