"""GMP: the clean loss and its rise under several draws of Gaussian noise."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatkern.methods._contexts import still_statistics
from flatkern.methods._windowed import Windowed
from flatkern.methods.base import LossFn
from flatkern.ops import _check


class GMP(Windowed):
    """g = (1 - lam) grad L(w) + lam / M sum_k grad L(w + e_k), e_k,j ~ N(0, sigma^2).

    The gradient of L(w) + lam (mean_k L(w + e_k) - L(w)), with M draws of their own on the same
    batches. M = 1 and lam = 1 is `RWP`, lam = 0 plain training. Batch norms count one pass. Costs M
    passes, and the clean one unless lam = 1. Source: Wang and Mao, "On the generalization of models
    trained with SGD: information-theoretic bounds and implications", 2022, arXiv:2110.03128,
    Gaussian model perturbation, which writes rho for lam.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.01,
        lam: float = 0.5,
        draws: int = 3,
        strategy: str = "gaussian",
        scope: str = "trainable",
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer: see `Method`.
            sigma, strategy, scope: see `flatkern.WeightNoise`.
            lam: weight of the rise, in [0, 1].
            draws: M, from 1 to 65535.
            options: schedule, mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method` and `flatkern.WeightNoise`; a number out of range.
        """
        super().__init__(model, optimizer, sigma=sigma, strategy=strategy, scope=scope, **options)
        _check.kinds("GMP", (float, int), lam=lam)
        if not 0 <= lam <= 1:
            _check.refuse("GMP", "lam", "in [0, 1]", lam)
        _check.kinds("GMP", int, draws=draws)
        if not 1 <= draws < 2**16:
            _check.refuse("GMP", "draws", "from 1 to 65535", draws)
        self.lam, self.draws = lam, draws

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mixed gradient; the loss is mixed alike."""
        loss = 0.0
        if self.lam < 1:
            loss += (1 - self.lam) * self.mean_gradient(loss_fn, batches, 1 - self.lam)
        share = self.lam / self.draws
        # What the first pass counted.
        still = self.lam < 1
        for draw in range(self.draws):
            # The last window ends the step.
            step = None if draw + 1 == self.draws else self.noise.step
            with (
                self.window(step, draw, micro_batches=len(batches)),
                contextlib.ExitStack() as stack,
            ):
                if still:
                    stack.enter_context(still_statistics(self.model))
                if self.lam > 0:
                    loss += share * self.mean_gradient(loss_fn, batches, share)
            still = True
        return loss
