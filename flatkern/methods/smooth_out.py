"""SmoothOut: one draw of uniform noise on the trained weights in every step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods import _rounding
from flatkern.methods._contexts import kept
from flatkern.methods._seeded import Seeded, add_uniform_, real_parts
from flatkern.methods.base import LossFn
from flatkern.noise.schedules import Schedule, factor_at, schedule_of
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check

# Of a weight's own values, and of rows as they lie in memory.
OWN = ("gaussian", "row", "flat_lora", "matrix")


class SmoothOut(Seeded):
    """The gradient at w + e, e_ij uniform in (-a, a), a = sqrt(3) S: RWP with other noise.

    S is the standard deviation: sigma, or by row sigma ||w_i||, as `flatkern.WeightNoise` has it
    for its strategies. One draw per optimizer step, removed before the update, w bit for bit. To
    second order E L(w + e) = L(w) + 1/2 sum_j S_j^2 H_jj, the same as under normals. Costs a copy
    of the trained weights. Source: Wen et al., "SmoothOut: smoothing out sharp minima to improve
    generalization in deep learning", 2018, arXiv:1805.07898; its adaptive form has noise by the
    norms of filters, strategy "row".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.01,
        strategy: str = "gaussian",
        schedule: Schedule | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter.

        Args:
            model, optimizer, options: see `Method`.
            sigma: a / sqrt(3), finite and at least 0.
            strategy: what S is: "gaussian" sigma alike for all, "row", "flat_lora" or "matrix".
            schedule: factor of sigma as a function of the 0-based step; None: constant.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, seed=seed, **options)
        _check.kinds("SmoothOut", (float, int), sigma=sigma)
        _check.finite("SmoothOut", "sigma", sigma, minimum=0.0)
        _check.one_of("SmoothOut", OWN, strategy=strategy)
        self.sigma, self.strategy = sigma, strategy
        self._schedule = schedule_of("SmoothOut", schedule)

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at w + e."""
        sigma = self.sigma * factor_at("SmoothOut", self._schedule, self._step)
        weights = list(self.trainable().values())
        if sigma == 0:
            return self.mean_gradient(loss_fn, batches)
        with kept(weights) as before:
            for weight, key in self.keyed():
                parts = real_parts(weight)
                add_uniform_(parts, self._half_widths(parts, sigma), key)
            if not self._told:
                self._told = True
                _rounding.tell_of_moved("SmoothOut", weights, before, "noise of this sigma")
            return self.mean_gradient(loss_fn, batches)

    def _half_widths(self, parts: Tensor, sigma: float) -> Tensor:
        """a of every row."""
        out = torch.empty(parts.shape[0], dtype=torch.float32, device=parts.device)
        if parts.numel():
            STRATEGIES[self.strategy]([out], [parts], None, None, [1.0], sigma)
        return out.mul_(3**0.5)
