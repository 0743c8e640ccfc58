"""The step that SAM and its relatives share: a gradient at a perturbed point."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods import _rounding
from flatkern.methods._contexts import kept, still_statistics
from flatkern.methods._ranks import dense
from flatkern.methods.base import LossFn, Method
from flatkern.noise import NoiseKey
from flatkern.ops import _check

# Keeps the step at a zero gradient finite, as in SAM's published code.
TINY = 1e-12


class Ascent(Method):
    """The gradient at w + e, where e is a step of length rho up the loss, from a first pass.

    Both passes run over all micro-batches; w is restored, bit for bit, before the update. Batch
    norms count the first pass alone. Costs a second pass and a copy of what is perturbed. A 16-bit
    weight, whose resolution may be coarser than e, is rounded up or down at random, so that its
    mean is w + e.

    A subclass overrides `perturbed` and `climb`.

    Attributes:
        rho: may be changed between steps, to schedule it.
        norm, last_only: as given.
    """

    norms: tuple[str, ...] = ("joint", "per_tensor")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float,
        norm: str,
        last_only: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Check what the relatives have in common.

        Args:
            model, optimizer, options: see `Method`.
            rho: radius, finite and at least 0.
            norm: whether the radius is that of one joint ball, or of one for each part.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            seed: of the rounding of 16-bit weights, in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, **options)
        name = type(self).__name__
        _check.kinds(name, (float, int), rho=rho)
        _check.finite(name, "rho", rho, minimum=0.0)
        _check.one_of(name, self.norms, norm=norm)
        _check.kinds(name, bool, last_only=last_only)
        self.rho = rho
        self.norm = norm
        self.last_only = last_only
        NoiseKey(seed)
        self._seed = seed
        self._step = 0
        self._told = False

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at w + e."""
        with self.ascended(loss_fn, batches), still_statistics(self.model):
            self.optimizer.zero_grad()
            return self.mean_gradient(loss_fn, batches[-1:] if self.last_only else batches)

    @contextlib.contextmanager
    def ascended(self, loss_fn: LossFn, batches: Sequence[Any]) -> Iterator[None]:
        """The model at w + e, with e from a first pass over `batches`."""
        self.mean_gradient(loss_fn, batches)
        weights = [weight for weight in self.perturbed() if weight.grad is not None]
        with kept(weights) as before:
            self.climb(weights)
            self.tell(weights, before)
            yield

    def perturbed(self) -> list[nn.Parameter]:
        """The parameters that are perturbed."""
        return list(self.trainable().values())

    def climb(self, weights: list[nn.Parameter]) -> None:
        """Add e to weights with gradients: here rho T^2 g / ||T g||, with T from `metric`."""
        metrics = [self.metric(weight.detach()) for weight in weights]
        norms = [wide_norm(t * dense(w.grad)) for t, w in zip(metrics, weights, strict=True)]
        factors = self.factors(norms)
        for index, (weight, metric) in enumerate(zip(weights, metrics, strict=True)):
            gradient = dense(weight.grad).to(torch.promote_types(weight.dtype, torch.float32))
            self.move(weight, metric * metric * gradient * factors[index], index)

    def move(self, weight: nn.Parameter, step: Tensor, number: int) -> None:
        """Add a step to a weight; the number tells the rounding of 16-bit weights apart."""
        _rounding.add_(weight.detach(), step, NoiseKey(self._seed, self._step, tensor=number))

    def tell(self, weights: list[nn.Parameter], before: list[Tensor]) -> None:
        """Warn, in the first step, where e is below the resolution of most of what it moves."""
        if not self._told and self.rho > 0:
            self._told = True
            what = "an ascent that is rounded at random, right on average,"
            _rounding.tell_of_moved(type(self).__name__, weights, before, what)

    def update(self) -> bool:
        """Step the optimizer, and go on to other random words."""
        stepped = super().update()
        self._step += stepped
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """The seed and the step of the random words that round 16-bit weights."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; those of older versions have neither seed nor step.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        if isinstance(state_dict, dict):
            state_dict = {"seed": self._seed, "step": 0, **state_dict}
        super().load_state_dict(state_dict)
        NoiseKey(state_dict["seed"], state_dict["step"])
        self._seed, self._step = state_dict["seed"], state_dict["step"]

    def metric(self, weight: Tensor) -> Tensor | float:
        """T, which makes the ball an ellipsoid."""
        return 1.0

    def factors(self, norms: list[Tensor]) -> list[Tensor]:
        """rho over the norm of each part, or of all of them, on the parts' devices."""
        if self.norm == "joint" and norms:
            total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
            norms = [total.to(norm.device) for norm in norms]
        return [self.rho / (norm + TINY) for norm in norms]


def wide_norm(values: Tensor) -> Tensor:
    """The 2-norm, summed in float32 or wider."""
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
