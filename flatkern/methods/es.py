"""Evolution strategies: gradients from the fitness of a population of perturbed weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._seeded import check_above_zero
from flatkern.methods.base import LossFn
from flatkern.methods.mezo import ForwardOnly
from flatkern.nn.calibration import evaluating
from flatkern.ops import _check

SHAPES = ("raw", "ranks", "zscore")


class ES(ForwardOnly):
    """g = 1 / (N sigma) sum_k F(L(w + sigma z_k)) z_k over a population of N, z_k ~ N(0, 1).

    With raw losses the expectation is the gradient of the smoothed loss E L(w + sigma z); of a
    quadratic one the antithetic sum is (2 / N) sum_k z_k z_k' grad L(w), exactly. A population is
    its seeds: member k's z is regenerated, w comes back bit for bit, and members see the same
    batches. An antithetic one of two is `MeZO` with mu = sigma. A loss may be a reward with its
    sign turned: nothing is differentiated. Costs N forwards and a copy of the trained weights.
    Sources: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement
    learning", 2017, arXiv:1703.03864; Qiu et al., "Evolution strategies at scale", 2025,
    arXiv:2509.24372, for language models (N = 30, z-scores, not antithetic).
    """

    distance = "sigma"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 1e-3,
        population: int = 30,
        antithetic: bool = True,
        fitness: str = "raw",
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Choose the population.

        Args:
            model, optimizer, options: see `Method`.
            sigma: standard deviation of the members' noise, finite and above 0.
            population: N, at least 1 (2 for ranks and z-scores) and even if antithetic.
            antithetic: whether members come in pairs w + sigma z and w - sigma z.
            fitness: F of the members' losses. "raw": as they are. "ranks": from -1/2 for the
                smallest loss to 1/2 for the largest, equal ones sharing theirs. "zscore": less
                their mean, over their standard deviation.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, seed=seed, **options)
        check_above_zero("ES", sigma=sigma)
        _check.kinds("ES", int, population=population)
        _check.kinds("ES", bool, antithetic=antithetic)
        _check.one_of("ES", SHAPES, fitness=fitness)
        least = 1 if fitness == "raw" and not antithetic else 2
        if population < least or (antithetic and population % 2):
            accepted = f"at least {least}" + " and even" * antithetic
            _check.refuse("ES", "population", accepted, population)
        self.sigma, self.population = sigma, population
        self.antithetic, self.fitness = antithetic, fitness

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Write g into `.grad`; the loss is the population's mean."""
        signs = (1, -1) if self.antithetic else (1,)
        draws = range(self.population // len(signs))
        with evaluating(self.model):
            losses = [
                self.loss_at(sign * self.sigma, loss_fn, batches, draw)
                for draw in draws
                for sign in signs
            ]
        values = torch.stack(losses)
        shaped = shape(values, self.fitness)
        if self.antithetic:
            shaped = shaped[::2] - shaped[1::2]
        self.write(list(shaped / (self.population * self.sigma)))
        return float(values.mean())


def shape(losses: Tensor, fitness: str) -> Tensor:
    """F of the losses [N]; all NaN where none of them is finite.

    A loss that is NaN ranks as the largest.
    """
    if fitness == "raw":
        return losses
    if fitness == "zscore":
        deviation = losses.std()
        # Equal losses tell nothing.
        return (losses - losses.mean()) / torch.where(deviation == 0, 1.0, deviation)
    values = torch.where(losses.isnan(), torch.inf, losses)
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1) - 1
    ranks = (below + equal / 2).to(losses.dtype) / (len(values) - 1) - 0.5
    return torch.where(losses.isfinite().any(), ranks, torch.nan)
