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
from flatkern.noise.keys import check_words
from flatkern.noise.schedules import Schedule, factor_at, schedule_of
from flatkern.ops import _check

# Keeps the step at a zero gradient finite, as in SAM's published code.
TINY = 1e-12


class Ascent(Method):
    """The gradient at w + e, where e is a step of length rho up the loss, from a first pass.

    All passes run over all micro-batches; w is restored, bit for bit, before the update. Batch
    norms count the first pass alone. Costs a second pass and a copy of what is perturbed. A 16-bit
    weight, whose resolution may be coarser than e, is rounded up or down at random, so that its
    mean is w + e.

    A subclass overrides `perturbed`, and `direction` or `climb`.

    Attributes:
        rho: may be changed between steps; saved in the state.
        norm, last_only, ascents: as given.
    """

    norms: tuple[str, ...] = ("joint", "per_tensor")
    # Whether e may be made of several steps, and whether the last micro-batch may stand for all.
    several_ascents, one_batch = True, True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float,
        norm: str,
        last_only: bool = False,
        schedule: Schedule | None = None,
        ascents: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Check what the relatives have in common.

        Args:
            model, optimizer, options: see `Method`.
            rho: radius, finite and at least 0.
            norm: whether the radius is that of one joint ball, or of one for each part.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            schedule: factor of rho as a function of the 0-based step; None: constant.
                `flatkern.linear_decay(total_steps)` and `flatkern.inverse_sqrt()` let it fall.
            ascents: K steps of length rho / K, each along the gradient where the last one led;
                every one costs a pass. Source: Kim et al., "Exploring the effect of multi-step
                ascent in sharpness-aware minimization", 2023, arXiv:2302.10181.
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
        self._schedule = schedule_of(name, schedule)
        _check.kinds(name, int, ascents=ascents)
        if ascents < 1:
            _check.refuse(name, "ascents", "at least 1", ascents)
        if ascents > 1 and not self.several_ascents:
            _check.refuse(name, "ascents", "1", ascents)
        if last_only and not self.one_batch:
            _check.refuse(name, "last_only", "False", last_only)
        self.ascents = ascents
        # Which of a step's ascents is under way.
        self._ascent = 0
        check_words(name, seed=seed)
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
        """The model at w + e, with e from passes over `batches`; `.grad` is that of the last."""
        self.mean_gradient(loss_fn, batches)
        weights = [weight for weight in self.perturbed() if weight.grad is not None]
        with kept(weights) as before:
            self._ascent = 0
            self.climb(weights)
            for _ in self.further_ascents(loss_fn, batches):
                self.climb([weight for weight in weights if weight.grad is not None])
            self.tell(weights, before)
            yield

    def further_ascents(self, loss_fn: LossFn, batches: Sequence[Any]) -> Iterator[int]:
        """The ascents after the first, each with the gradient where the model is in `.grad`."""
        for number in range(1, self.ascents):
            self._ascent = number
            # The weights were written since an autocast around the step cast them.
            torch.clear_autocast_cache()
            self.optimizer.zero_grad()
            with still_statistics(self.model):
                self.mean_gradient(loss_fn, batches)
            yield number
        torch.clear_autocast_cache()

    def perturbed(self) -> list[nn.Parameter]:
        """The parameters that are perturbed."""
        return list(self.trainable().values())

    def climb(self, weights: list[nn.Parameter]) -> None:
        """Add e to weights with gradients: here rho T^2 g / ||T g||, with T from `metric`."""
        self.climb_along(weights, [self.direction(weight) for weight in weights])

    def direction(self, weight: nn.Parameter) -> Tensor:
        """g, the way up: the weight's gradient."""
        return dense(weight.grad)

    def climb_along(
        self, weights: list[nn.Parameter], directions: list[Tensor], length: float | None = None
    ) -> None:
        """Add steps of this length along the directions; None: the radius of an ascent."""
        metrics = [self.metric(weight.detach()) for weight in weights]
        norms = [wide_norm(t * d) for t, d in zip(metrics, directions, strict=True)]
        factors = self.factors(norms, length)
        for index, (weight, metric) in enumerate(zip(weights, metrics, strict=True)):
            way = directions[index].to(torch.promote_types(weight.dtype, torch.float32))
            self.move(weight, metric * metric * way * factors[index], index)

    def move(self, weight: nn.Parameter, step: Tensor, number: int) -> None:
        """Add a step to a weight; the number tells the rounding of 16-bit weights apart."""
        key = NoiseKey(self._seed, self._step, draw=self._ascent, tensor=number)
        _rounding.add_(weight.detach(), step, key)

    @property
    def rho_t(self) -> float:
        """The radius of the step that comes next: rho times the schedule's factor."""
        return self.rho * factor_at(type(self).__name__, self._schedule, self._step)

    def tell(self, weights: list[nn.Parameter], before: list[Tensor]) -> None:
        """Warn, in the first step, where e is below the resolution of most of what it moves."""
        if not self._told and self.rho_t > 0:
            self._told = True
            what = "an ascent that is rounded at random, right on average,"
            _rounding.tell_of_moved(type(self).__name__, weights, before, what)

    def update(self) -> bool:
        """Step the optimizer, and go on to the next radius and other random words."""
        stepped = super().update()
        self._step += stepped
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """rho, the step that its schedule counts, and the seed of the rounding in 16 bits."""
        return {"seed": self._seed, "step": self._step, "rho": self.rho}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; what those of older versions lack stays as it is.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        if isinstance(state_dict, dict):
            state_dict = {"seed": self._seed, "step": 0, "rho": self.rho, **state_dict}
        super().load_state_dict(state_dict)
        name, rho = type(self).__name__, state_dict["rho"]
        check_words(name, seed=state_dict["seed"], step=state_dict["step"])
        _check.kinds(name, (float, int), rho=rho)
        _check.finite(name, "rho", rho, minimum=0.0)
        self._seed, self._step, self.rho = state_dict["seed"], state_dict["step"], rho

    def metric(self, weight: Tensor) -> Tensor | float:
        """T, which makes the ball an ellipsoid."""
        return 1.0

    def factors(self, norms: list[Tensor], length: float | None = None) -> list[Tensor]:
        """An ascent's radius over the norm of each part, or of all, on the parts' devices."""
        length = self.rho_t / self.ascents if length is None else length
        if self.norm == "joint" and norms:
            total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
            norms = [total.to(norm.device) for norm in norms]
        return [length / (norm + TINY) for norm in norms]


def wide_norm(values: Tensor) -> Tensor:
    """The 2-norm, summed in float32 or wider."""
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
