"""Friendly-SAM: SAM's step along what a batch has to itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._means import mean_of_state
from flatkern.methods._ranks import dense
from flatkern.methods.base import LossFn
from flatkern.ops import _check


class FriendlySAM(Ascent):
    """The gradient at w + e, e = rho d / ||d|| with d = g - sigma m, g the gradient at w.

    m is a running mean of the steps' g, of those before this one: m <- lam m + (1 - lam) g after d
    was taken, and the first step is SAM's. It stands for the full gradient, which SAM's ascent
    should leave out. sigma = 0 is SAM. Source: Li et al., "Friendly sharpness-aware minimization",
    2024, arXiv:2403.12350, and its published code. Costs a second pass, a copy of the trained
    weights and m.
    """

    several_ascents = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        sigma: float = 1.0,
        lam: float = 0.9,
        norm: str = "joint",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0.
            sigma: how much of m is taken off, finite and at least 0; not a standard deviation.
            lam: what m keeps of itself in a step, in [0, 1); 0.6 to 0.95 in the source.
            norm: "joint", one ball for all tensors, or "per_tensor", one for each.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            options: `schedule` of rho and `seed`, see `Ascent` in _ascent.py; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        _check.kinds("FriendlySAM", (float, int), sigma=sigma, lam=lam)
        _check.finite("FriendlySAM", "sigma", sigma, minimum=0.0)
        if not 0 <= lam < 1:
            _check.refuse("FriendlySAM", "lam", "in [0, 1)", lam)
        self.sigma, self.lam = sigma, lam
        self._mean: dict[str, Tensor] = {}
        self._next_mean = self._mean

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """SAM's; the next m waits for the update."""
        self._next_mean = dict(self._mean)
        return super().gradient(loss_fn, batches)

    def climb(self, weights: list[nn.Parameter]) -> None:
        """Add e to weights with gradients."""
        names = {id(p): name for name, p in self.trainable().items()}
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        directions = []
        for weight in weights:
            name = names[id(weight)]
            g = dense(weight.grad).to(torch.promote_types(weight.dtype, torch.float32))
            mean = self._mean.get(name)
            directions.append(g if mean is None else g - self.sigma * scale * mean)
            # m is of gradients that are not scaled.
            own = g / scale
            self._next_mean[name] = own if mean is None else mean * self.lam + own * (1 - self.lam)
        self.climb_along(weights, directions)

    def update(self) -> bool:
        """Step the optimizer, and with it m."""
        stepped = super().update()
        if stepped:
            self._mean = self._next_mean
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """m by the names of the weights; rho, step and seed as in SAM."""
        mean = {name: value.clone() for name, value in self._mean.items()}
        return {"mean": mean, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        mean = mean_of_state("FriendlySAM", state_dict, self.trainable(), "of trainable parameters")
        super().load_state_dict(state_dict)
        self._mean = mean
