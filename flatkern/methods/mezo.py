"""MeZO: gradients from two forwards and no backward."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern.methods import _rounding
from flatkern.methods._contexts import kept
from flatkern.methods.base import LossFn, Method
from flatkern.nn.calibration import evaluating
from flatkern.noise import NoiseKey
from flatkern.noise.numbers import tensor_numbers
from flatkern.ops import _check


class MeZO(Method):
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
        super().__init__(model, optimizer, **options)
        _check.kinds("MeZO", (float, int), mu=mu)
        _check.finite("MeZO", "mu", mu)
        if not mu > 0:
            _check.refuse("MeZO", "mu", "above 0", mu)
        NoiseKey(seed)
        self.mu = mu
        self._seed = seed
        self._step = 0
        self._told = False

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Write p z into `.grad`; the loss is the mean of those at the two points."""
        with evaluating(self.model):
            plus = self._loss_at(self.mu, loss_fn, batches)
            minus = self._loss_at(-self.mu, loss_fn, batches)
        slope = self.scaled((plus - minus) / (2 * self.mu))
        for weight, key in self._keyed():
            z = _noise(_parts(weight), key)
            grad = (slope.to(z.device) * z).to(_parts(weight).dtype)
            weight.grad = torch.view_as_complex(grad) if weight.is_complex() else grad
        return float((plus + minus) / 2)

    def _loss_at(self, distance: float, loss_fn: LossFn, batches: Sequence[Any]) -> Tensor:
        weights = list(self.trainable().values())
        with kept(weights) as before:
            for weight, key in self._keyed():
                if weight.numel():
                    ops.perturb_(*_operands(_parts(weight), distance), key)
            if not self._told:
                self._told = True
                _rounding.tell_of_moved("MeZO", weights, before, "mu")
            return self.mean_loss(loss_fn, batches)

    def _keyed(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        # In the order of the parameters, whatever their names are.
        numbers = tensor_numbers(self.model).values()
        for weight, number in zip(self.model.parameters(), numbers, strict=True):
            if weight.requires_grad:
                key = NoiseKey(self._seed, self._step, tensor=number)
                yield weight, key.to(weight.device)

    def update(self) -> bool:
        """Step the optimizer, and go on to the next z."""
        stepped = super().update()
        self._step += 1
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """The seed and the step."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        super().load_state_dict(state_dict)
        NoiseKey(**state_dict)
        self._seed, self._step = state_dict["seed"], state_dict["step"]


def _parts(weight: nn.Parameter) -> Tensor:
    """The weight's real numbers, in its own memory."""
    weight = weight.detach()
    return torch.view_as_real(weight) if weight.is_complex() else weight


def _operands(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The weight as the ops see it, which take nothing without dimensions, and a row scale."""
    weight = weight if weight.dim() else weight.view(1)
    like = {"dtype": torch.float32, "device": weight.device}
    return weight, torch.full(weight.shape[:1], scale, **like)


def _noise(weight: Tensor, key: Tensor) -> Tensor:
    """z of the weight's shape, from the implementation that perturbs the weight."""
    wide = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    if wide.numel():
        ops.perturb_(*_operands(wide, 1.0), key)
    return wide
