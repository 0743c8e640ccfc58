"""How much the loss rises around the weights: on average, at the worst draw, and by ascent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.landscape._estimate import Estimate
from flatkern.landscape._evaluate import Evaluation, LossFn
from flatkern.landscape._gradients import Ascent
from flatkern.landscape._progress import progress_of
from flatkern.landscape._weights import Shift, Weight, find_weights
from flatkern.noise.keys import check_words
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check

_STRATEGIES = tuple(name for name in STRATEGIES if name != "fisher")


def average_flatness(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    sigma: float = 0.05,
    strategy: str = "flat_lora",
    draws: int = 16,
    seed: int = 0,
    scope: str | None = None,
    confidence: float = 0.95,
    progress: bool = False,
) -> Estimate:
    """E[L(W + V)] - L(W) over noise V, from antithetic pairs: (L(W + V) + L(W - V)) / 2 - L(W).

    Pairs cancel the slope, so what is left is curvature: on a quadratic 1/2 sum S_ij^2 H_ij,ij
    with S the noise's standard deviations. The noise is a function of the seed and of names and
    places alone: models that are compared see the same draws, at any scale. No training under
    noise uses these draws. Source: the average case of Flat-LoRA (Li et al., 2024,
    arXiv:2409.14396); antithetic pairs, Hammersley and Morton, 1956.

    Args:
        model: any module; evaluated in eval mode, its weights keep their bits. PEFT's models are
            attached first (`flatkern.integrations.peft.attach`).
        loss_fn: takes nothing and returns the loss, a scalar: of held-out data, always the same,
            in as many batches as it likes. It calls `model`.
        sigma: strength, finite and at least 0; its unit is the strategy's.
        strategy: one of `flatkern.WeightNoise`'s but "fisher".
        draws: how many pairs, at least 1; two evaluations each.
        seed: in [0, 2^32).
        scope: as in `flatkern.WeightNoise`; None: "merged" where the model has layers for that
            (the merged weights in full space), else "full".
        confidence: of the interval, in (0, 1).
        progress: show a bar (needs tqdm).

    Returns:
        the mean over pairs, a float with `interval` and `samples`; NaN if a loss was.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or nothing in scope.
        RuntimeError: a noise window is open, or a layer is merged.
    """
    op = "average_flatness"
    _check_sampling(op, sigma, strategy, draws, seed)
    _check.kinds(op, float, confidence=confidence)
    if not 0 < confidence < 1:
        _check.refuse(op, "confidence", "in (0, 1)", confidence)
    weights = find_weights(op, model, scope, strategy)
    noise = _Noise(weights, strategy, seed)
    with Evaluation(op, model, loss_fn, weights) as at:
        losses = noise.losses(at, [sigma], draws, progress, op)[0]
    return Estimate(losses.mean(1) - at.plain, confidence)


@dataclass(frozen=True)
class WorstFlatness:
    """The two worst cases, which are different things.

    Attributes:
        sampled: the largest rise of the loss over the draws and their negatives. In many dimensions
            it follows the Hessian's trace, as the average does.
        ascent: the largest rise that gradient ascent found on a ball of radius `rho`; follows the
            largest eigenvalue: 1/2 rho^2 lambda_max at a stationary quadratic.
        draw, sign: which draw was the worst: `surface_2d(..., draws=(worst.draw, ...))`.
        rho: the radius of the ascent.
        losses: float64 [draws, 2], at W + V and W - V.
        plain: the loss at the weights.
    """

    sampled: float
    ascent: float | None
    draw: int
    sign: int
    rho: float
    losses: Tensor
    plain: float


def worst_flatness(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    sigma: float = 0.05,
    strategy: str = "flat_lora",
    draws: int = 16,
    seed: int = 0,
    rho: float | None = None,
    ascent_steps: int = 20,
    scope: str | None = None,
    progress: bool = False,
) -> WorstFlatness:
    """max L(W + V) - L(W): over sampled noise, and by ascent in the ball that holds the noise.

    The ascent goes from delta = 0, or where the gradient is 0 from the worst draw, by delta <-
    rho g(W + delta) / ||g(W + delta)||, and the best of its points counts; the first is SAM's
    (Foret et al., 2021, arXiv:2010.01412). It needs gradients of the weights in scope: memory for
    two copies of them, no shards and no quantised bases.

    Args:
        model, loss_fn, sigma, strategy, draws, seed, scope, progress: as in `average_flatness`.
            The ascent differentiates the loss that `loss_fn` returns.
        rho: radius of the ascent over all weights in scope together, finite and above 0. None: the
            length of the worst draw's noise, so that both answers are of one ball.
        ascent_steps: at most so many, at least 0; it ends when a step adds less than 1e-5 of the
            rise. With 0 there is no ascent, and `ascent` is None.

    Raises:
        TypeError, ValueError: as `average_flatness`; `loss_fn` returns no differentiable loss.
        RuntimeError: a noise window is open, or a layer is merged.
    """
    op = "worst_flatness"
    _check_sampling(op, sigma, strategy, draws, seed)
    _check.kinds(op, (float, int), optional=True, rho=rho)
    if rho is not None and not 0 < rho < float("inf"):
        _check.refuse(op, "rho", "finite and above 0", rho)
    _check.kinds(op, int, ascent_steps=ascent_steps)
    if ascent_steps < 0:
        _check.refuse(op, "ascent_steps", "at least 0", ascent_steps)
    weights = find_weights(op, model, scope, strategy)
    if ascent_steps:
        Ascent.check(op, weights)
    noise = _Noise(weights, strategy, seed)
    with Evaluation(op, model, loss_fn, weights) as at:
        losses = noise.losses(at, [sigma], draws, progress, op)[0]
    flat = losses.nan_to_num(nan=float("-inf")).flatten()
    index = int(flat.argmax())
    draw, sign = index // 2, 1 - 2 * (index % 2)
    sampled = float(losses.flatten()[index]) - at.plain
    shifts = noise.shifts(sign * sigma, draw)
    rho = noise.length(sigma, draw) if rho is None else float(rho)
    ascent = None
    if ascent_steps:
        ascent = Ascent(op, model, loss_fn, weights).rise(rho, ascent_steps, shifts)
    return WorstFlatness(sampled, ascent, draw, sign, rho, losses, at.plain)


@dataclass(frozen=True)
class RadiusCurve:
    """The loss over the strength of the noise.

    Attributes:
        sigmas: float64 [n].
        losses: float64 [n, draws, 2], at W + V and W - V.
        plain: the loss at the weights.
        mean, low, high: float64 [n], the average rise and its interval, as `average_flatness`.
        worst: float64 [n], the largest rise over the draws.
    """

    sigmas: Tensor
    losses: Tensor
    plain: float
    confidence: float = 0.95

    def _estimates(self) -> list[Estimate]:
        return [Estimate(own.mean(1) - self.plain, self.confidence) for own in self.losses]

    @property
    def mean(self) -> Tensor:
        """The average rise."""
        return torch.tensor([float(one) for one in self._estimates()], dtype=torch.float64)

    @property
    def low(self) -> Tensor:
        """The lower ends of the intervals."""
        return torch.tensor([one.interval[0] for one in self._estimates()], dtype=torch.float64)

    @property
    def high(self) -> Tensor:
        """The upper ends."""
        return torch.tensor([one.interval[1] for one in self._estimates()], dtype=torch.float64)

    @property
    def worst(self) -> Tensor:
        """The largest rise over the draws."""
        return self.losses.flatten(1).amax(1) - self.plain


def radius_curve(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    sigmas: Sequence[float] = (0.0125, 0.025, 0.05, 0.1, 0.15),
    strategy: str = "flat_lora",
    draws: int = 8,
    seed: int = 0,
    scope: str | None = None,
    confidence: float = 0.95,
    progress: bool = False,
) -> RadiusCurve:
    """`average_flatness` at several strengths of the same draws.

    Args:
        model, loss_fn, strategy, draws, seed, scope, confidence, progress: as `average_flatness`.
        sigmas: strengths, each finite and at least 0.

    Raises:
        As `average_flatness`.
    """
    op = "radius_curve"
    sigmas = [*sigmas]
    if not sigmas:
        _check.refuse(op, "sigmas", "at least one", sigmas)
    for sigma in sigmas:
        _check_sampling(op, sigma, strategy, draws, seed, name="sigmas")
    weights = find_weights(op, model, scope, strategy)
    noise = _Noise(weights, strategy, seed)
    with Evaluation(op, model, loss_fn, weights) as at:
        losses = noise.losses(at, sigmas, draws, progress, op)
    return RadiusCurve(torch.tensor(sigmas, dtype=torch.float64), losses, at.plain, confidence)


def _check_sampling(
    op: str, sigma: Any, strategy: str, draws: int, seed: int, name: str = "sigma"
) -> None:
    _check.kinds(op, (float, int), **{name: sigma})
    _check.finite(op, name, sigma, minimum=0.0)
    _check.one_of(op, _STRATEGIES, strategy=strategy)
    _check.kinds(op, int, draws=draws)
    if not 1 <= draws < 2**32:
        _check.refuse(op, "draws", "at least 1", draws)
    check_words(op, seed=seed)


class _Noise:
    """The draws of a seed over some weights."""

    def __init__(self, weights: list[Weight], strategy: str, seed: int) -> None:
        self._weights, self._seed = weights, seed
        # Scales are sigma times these, for every strategy.
        self._scales = [w.scale(w.strategy) for w in weights]

    def shifts(self, sigma: float, draw: int) -> list[Shift | None]:
        """Of each weight."""
        return [
            Shift((scale * sigma)[None], weight.key(self._seed, draw)[None], weight.elementwise)
            for weight, scale in zip(self._weights, self._scales, strict=True)
        ]

    def losses(
        self, at: Evaluation, sigmas: Sequence[float], draws: int, progress: bool, op: str
    ) -> Tensor:
        """float64 [sigmas, draws, 2]: at W + V and at W - V."""
        losses = torch.empty(len(sigmas), draws, 2, dtype=torch.float64)
        with progress_of(op, losses.numel(), progress) as advance:
            for i, sigma in enumerate(sigmas):
                for draw in range(draws):
                    for k, sign in enumerate((1, -1)):
                        shifts = self.shifts(sign * sigma, draw)
                        losses[i, draw, k] = at.loss(shifts) if sigma else at.plain
                        advance()
        return losses

    def length(self, sigma: float, draw: int) -> float:
        """||V|| of a draw over all weights; where noise is relative to |W_ij|, its expectation."""
        total = 0.0
        for weight, scale in zip(self._weights, self._scales, strict=True):
            if weight.elementwise:
                total += sigma**2 * float(weight.norms(merged=False).square().sum())
            else:
                squares = weight.products([weight.key(self._seed, draw)])[0]
                total += float((scale.double() * sigma).square() @ squares)
        return total**0.5
