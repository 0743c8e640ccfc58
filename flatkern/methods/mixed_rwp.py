"""m-RWP: a mix of the noisy and the clean gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatkern.methods._contexts import still_statistics
from flatkern.methods._windowed import Windowed
from flatkern.methods.base import LossFn
from flatkern.noise import Fisher
from flatkern.ops import _check

SPLITS = ("halves", "last")


class MixedRWP(Windowed):
    """g = lam grad L(w + e; noisy batches) + (1 - lam) grad L(w; clean batches).

    The clean pass comes first; batch norms do not count the noisy one. lam = 0 is plain training,
    1 is RWP on the noisy batches. strategy "fisher" is mARWP, see `ARWP`; scopes "lora", "full"
    and "origin" are RWP-LoRA's. Source: Li et al., "Revisiting random weight perturbation", 2024.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.01,
        lam: float = 0.5,
        split: str = "halves",
        strategy: str = "row",
        scope: str = "trainable",
        eta: float = 0.1,
        beta: float = 0.99,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter, unless `scope` says otherwise.

        Args:
            model, optimizer: see `Method`.
            sigma, strategy, scope: see `flatkern.WeightNoise`.
            lam: weight of the noisy gradient, in [0, 1].
            split: which micro-batches are which. "halves": the first half clean, the second
                noisy, an odd one in the middle both. "last" (RWP-LoRA): all clean, the last noisy.
            eta, beta: of `flatkern.Fisher`, for strategy "fisher".
            options: schedule, mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`, `flatkern.WeightNoise` and `flatkern.Fisher`; a
                weight out of range; "fisher" with a scope of frozen weights outside LoRALinear.
        """
        fisher = Fisher(eta, beta)
        super().__init__(
            model,
            optimizer,
            sigma=sigma,
            strategy=strategy,
            scope=scope,
            fisher=fisher if strategy == "fisher" else None,
            **options,
        )
        _check.kinds("MixedRWP", (float, int), lam=lam)
        if not 0 <= lam <= 1:
            _check.refuse("MixedRWP", "lam", "in [0, 1]", lam)
        _check.one_of("MixedRWP", SPLITS, split=split)
        self.lam = lam
        self.split = split

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mixed gradient; the loss is mixed alike."""
        count = len(batches)
        clean, noisy = batches[: (count + 1) // 2], batches[count // 2 :]
        if self.split == "last":
            clean, noisy = batches, batches[-1:]
        loss = 0.0
        if self.lam < 1:
            loss += (1 - self.lam) * self.mean_gradient(loss_fn, clean, 1 - self.lam)
        if self.lam > 0:
            with still_statistics(self.model):
                loss += self.lam * self.noisy_gradient(loss_fn, noisy, self.lam)
        return loss
