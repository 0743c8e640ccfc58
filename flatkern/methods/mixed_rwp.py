"""m-RWP: a mix of the noisy and the clean gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from flatkern.methods._contexts import still_statistics
from flatkern.methods._windowed import Windowed
from flatkern.methods.base import LossFn
from flatkern.noise import Fisher
from flatkern.ops import _check

SPLITS = ("halves", "last", "ranks")


class MixedRWP(Windowed):
    """g = a grad L(w; clean batches) + b grad L(w + e; noisy batches), a = 1 - lam and b = lam.

    The clean pass comes first; batch norms do not count the noisy one. lam = 0 is plain training,
    1 is RWP on the noisy batches; a and b may be given apart, as RWP-LoRA's notes do. Under DDP a
    rank runs what is its own of either pass, and the ranks average the gradients themselves:
    communication hooks do not see them. strategy "fisher" is mARWP, see `ARWP`; scopes "lora",
    "full" and "origin" are RWP-LoRA's. Source: Li et al., "Revisiting random weight perturbation",
    2024, arXiv:2404.00357.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float = 0.01,
        lam: float | None = None,
        a: float | None = None,
        b: float | None = None,
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
            lam: weight of the noisy gradient, in [0, 1]; None: 0.5.
            a, b: weights of the clean and of the noisy gradient, finite, at least 0 and not both
                0; both or neither, and instead of lam.
            split: which micro-batches are which. "halves": the first half clean, the second
                noisy, an odd one in the middle both. Of P ranks under DDP, rank r has the
                micro-batches k P + r: what one process has that takes the ranks' k-th ones one
                after the other. Ranks that share weights (FSDP2) halve their own.
                "last" (RWP-LoRA): all clean, the last noisy, on every rank.
                "ranks": those of ranks 0, 2, ... clean, of 1, 3, ... noisy; either gradient is the
                mean over its ranks, however many. DDP alone.
            eta, beta: of `flatkern.Fisher`, for strategy "fisher".
            options: schedule, mode, seed, ranks of `flatkern.WeightNoise`; those of `Method`.

        Raises:
            TypeError, ValueError: see `Method`, `flatkern.WeightNoise` and `flatkern.Fisher`; a
                weight out of range, or given twice; "fisher" with a scope of frozen weights outside
                LoRALinear.
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
        self.a, self.b = _weights(lam, a, b)
        _check.one_of("MixedRWP", SPLITS, split=split)
        self.split = split

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mixed gradient; the loss is mixed alike."""
        clean, noisy = self._passes(batches)
        apart = self.ranks.size > 1 and self.ranks.whole
        loss = 0.0
        if self.a > 0:
            total = self.own_gradient(loss_fn, clean.batches, self.a * clean.share, apart)
            if apart:
                self.ranks.average_gradients(list(self.trainable().values()))
            loss += self.a * self.mean_number(total * clean.share, max(len(clean.batches), 1))
        if self.b > 0:
            with still_statistics(self.model):
                loss += self.b * self._noisy(loss_fn, noisy, apart)
        return loss

    def _noisy(self, loss_fn: LossFn, noisy: "_Pass", apart: bool) -> float:
        return self.noisy_gradient(loss_fn, noisy.batches, self.b, noisy.share, apart)

    def _passes(self, batches: Sequence[Any]) -> tuple["_Pass", "_Pass"]:
        """This rank's clean and noisy batches."""
        ranks, count = self.ranks, len(batches)
        if self.split == "last":
            return _Pass(batches, 1.0), _Pass(batches[-1:], 1.0)
        alone = ranks.size == 1 or not ranks.whole
        if self.split == "ranks":
            if alone:
                accepted = "'halves' or 'last' without several ranks under DDP"
                _check.refuse("MixedRWP", "split", accepted, self.split)
            parts = (ranks.size + 1) // 2, ranks.size // 2
            own = [batches, []] if ranks.rank % 2 == 0 else [[], batches]
            return tuple(_Pass(b, ranks.size / n) for b, n in zip(own, parts, strict=True))
        size, rank = (1, 0) if alone else (ranks.size, ranks.rank)
        if not alone:
            device = next(iter(self.trainable().values())).device
            largest = ranks.largest(torch.tensor([count, -count], device=device)).tolist()
            if largest != [count, -count]:
                accepted = "as many on every rank"
                _check.refuse("MixedRWP", "batches", accepted, [-largest[1], largest[0]])
        every = count * size
        half = (every + 1) // 2
        places = [k * size + rank for k in range(count)]
        clean = [b for b, place in zip(batches, places, strict=True) if place < half]
        noisy = [b for b, place in zip(batches, places, strict=True) if place >= every - half]
        return tuple(_Pass(own, size * len(own) / half) for own in (clean, noisy))


def _weights(lam: float | None, a: float | None, b: float | None) -> tuple[float, float]:
    """Those of the clean and of the noisy gradient."""
    _check.kinds("MixedRWP", (float, int), optional=True, lam=lam, a=a, b=b)
    if a is None and b is None:
        lam = 0.5 if lam is None else lam
        if not 0 <= lam <= 1:
            _check.refuse("MixedRWP", "lam", "in [0, 1]", lam)
        return 1 - lam, lam
    if lam is not None:
        raise ValueError(f"MixedRWP: lam must be None beside a and b, got {lam}")
    for name, weight in (("a", a), ("b", b)):
        if weight is None:
            _check.refuse("MixedRWP", name, "given where the other of a and b is", weight)
        _check.finite("MixedRWP", name, weight, minimum=0.0)
    if a == b == 0:
        _check.refuse("MixedRWP", "b", "above 0 where a is 0", b)
    return a, b


class _Pass(NamedTuple):
    """A rank's batches of a pass, and what their mean counts in the mean of all ranks."""

    batches: Sequence[Any]
    share: float
