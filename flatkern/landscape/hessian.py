"""The Hessian of the loss: its largest eigenvalue and its trace, from products with vectors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern.landscape._estimate import Estimate
from flatkern.landscape._evaluate import LossFn
from flatkern.landscape._gradients import Derivatives, check_differentiable, dot
from flatkern.landscape._progress import progress_of
from flatkern.landscape._weights import Weight, find_weights
from flatkern.noise.keys import check_words
from flatkern.ops import _check

Product = Callable[[list[Tensor]], list[Tensor]]


class Eigenvalue(float):
    """An eigenvalue: a float that knows how far from one it may be.

    Attributes:
        residual: ||H x - theta x|| of the unit vector x that it belongs to: an eigenvalue lies as
            near as that.
        steps: products with H.
        converged: whether the residual came below the tolerance.
    """

    residual: float
    steps: int
    converged: bool

    def __new__(cls, value: float, residual: float, steps: int, converged: bool) -> "Eigenvalue":
        """All four."""
        self = super().__new__(cls, value)
        self.residual, self.steps, self.converged = residual, steps, converged
        return self

    def __reduce__(self) -> tuple:
        """Copies keep all of it."""
        return type(self), (float(self), self.residual, self.steps, self.converged)


def hessian_top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    tolerance: float = 0.01,
    max_steps: int = 200,
    seed: int = 0,
    scope: str | None = None,
    progress: bool = False,
) -> Eigenvalue:
    """The largest eigenvalue of the loss's Hessian in the weights in scope, by Lanczos' method.

    One forward and a backward with a graph, then a backward for each step. The recurrence keeps
    three vectors of the weights' size and no basis: without reorthogonalisation eigenvalues that
    have converged come again, which moves the largest by rounding only (Paige, "Accuracy and
    effectiveness of the Lanczos algorithm", 1980). It starts from the seed's noise.

    Args:
        model: any module; evaluated in eval mode, with attention's math kernel, which alone has
            second derivatives. Its weights are not written. No shards, no quantised weights.
        loss_fn: takes nothing and returns a differentiable scalar tensor.
        tolerance: the residual that ends it, relative to the eigenvalue; above 0.
        max_steps: most products with H, at least 1. Where they do not suffice, `converged` says so.
        seed: in [0, 2^32).
        scope: as in `average_flatness`; the Hessian in W is that in W' = W + s B A.
        progress: show a bar (needs tqdm).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, weights or a loss that cannot
            be differentiated, or nothing in scope.
        RuntimeError: a noise window is open; something in the model has no second derivative.
    """
    op = "hessian_top_eigenvalue"
    _check.kinds(op, (float, int), tolerance=tolerance)
    if not 0 < tolerance < 1:
        _check.refuse(op, "tolerance", "in (0, 1)", tolerance)
    _check.kinds(op, int, max_steps=max_steps)
    if max_steps < 1:
        _check.refuse(op, "max_steps", "at least 1", max_steps)
    check_words(op, seed=seed)
    weights = find_weights(op, model, scope)
    check_differentiable(op, weights)
    derivatives = Derivatives(op, model, loss_fn, weights)
    with derivatives.open(), progress_of(op, max_steps, progress) as advance:
        product = _hessian(derivatives)
        start = [_normals(weight, seed, 0) for weight in _each(weights)]
        return _lanczos(product, start, tolerance, max_steps, advance)


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    probes: int = 32,
    seed: int = 0,
    scope: str | None = None,
    confidence: float = 0.95,
    progress: bool = False,
) -> Estimate:
    """The trace of the loss's Hessian in the weights in scope: the mean of v^T H v, v = +-1.

    Exact with one probe where H is diagonal. Source: Hutchinson, "A stochastic estimator of the
    trace of the influence matrix", 1990.

    Args:
        model, loss_fn, seed, scope, progress: as in `hessian_top_eigenvalue`.
        probes: products with H, at least 1.
        confidence: of the interval, in (0, 1).

    Returns:
        the mean over probes, a float with `interval` and `samples`.

    Raises:
        As `hessian_top_eigenvalue`.
    """
    op = "hessian_trace"
    _check.kinds(op, int, probes=probes)
    if not 1 <= probes < 2**32:
        _check.refuse(op, "probes", "at least 1", probes)
    _check.kinds(op, float, confidence=confidence)
    if not 0 < confidence < 1:
        _check.refuse(op, "confidence", "in (0, 1)", confidence)
    check_words(op, seed=seed)
    weights = find_weights(op, model, scope)
    check_differentiable(op, weights)
    derivatives = Derivatives(op, model, loss_fn, weights)
    samples = torch.empty(probes, dtype=torch.float64)
    with derivatives.open(), progress_of(op, probes, progress) as advance:
        product = _hessian(derivatives)
        for k in range(probes):
            probe = [_normals(weight, seed, k).sign_() for weight in _each(weights)]
            # The sign of 0 is 0: nowhere, almost surely, and 1 there.
            for part in probe:
                part[part == 0] = 1
            samples[k] = dot(probe, product(probe))
            advance()
    return Estimate(samples, confidence)


def _each(weights: list[Weight]) -> list[Weight]:
    """One for each parameter, in the order of `Derivatives.parameters`."""
    return list({id(weight.held): weight for weight in reversed(weights)}.values())[::-1]


def _normals(weight: Weight, seed: int, draw: int) -> Tensor:
    """Standard normals of a weight's shape and dtype."""
    shape = weight.shape
    z = ops.noise(shape[0], shape[1:].numel(), weight.key(seed, draw))
    return z.view(weight.held.shape).to(weight.held.dtype)


def _hessian(derivatives: Derivatives) -> Product:
    """v to H v, by a backward through the gradient's graph."""
    gradient = derivatives.gradient(derivatives.loss(), graph=True)
    pairs = [(i, g) for i, g in enumerate(gradient) if g.requires_grad]

    def product(vector: list[Tensor]) -> list[Tensor]:
        if not pairs:  # a linear loss
            return [torch.zeros_like(part) for part in vector]
        found = torch.autograd.grad(
            [g for _, g in pairs],
            derivatives.parameters,
            [vector[i] for i, _ in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return [part.detach() for part in found]

    return product


def _lanczos(
    product: Product,
    start: list[Tensor],
    tolerance: float,
    max_steps: int,
    advance: Callable[[], None],
) -> Eigenvalue:
    """The largest Ritz value of the three-term recurrence."""
    size = sum(part.numel() for part in start)
    length = dot(start, start) ** 0.5
    now = [part / length for part in start]
    before: list[Tensor] | None = None
    diagonal: list[float] = []
    off: list[float] = []
    with torch.no_grad():
        for step in range(1, max_steps + 1):
            with torch.enable_grad():
                after = product(now)
            advance()
            alpha = dot(now, after)
            diagonal.append(alpha)
            torch._foreach_add_(after, now, alpha=-alpha)
            if before is not None:
                torch._foreach_add_(after, before, alpha=-off[-1])
            beta = dot(after, after) ** 0.5
            value, last = _top_ritz(diagonal, off)
            residual = beta * abs(last)
            # Also where the vectors have spanned all there is.
            if not residual > tolerance * abs(value) or step >= max(size, 1):
                return Eigenvalue(value, residual, step, residual <= tolerance * abs(value))
            off.append(beta)
            before, now = now, torch._foreach_div(after, beta)
    return Eigenvalue(value, residual, max_steps, False)


def _top_ritz(diagonal: list[float], off: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of the tridiagonal matrix, and the last entry of its vector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off:
        beside = torch.tensor(off, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    if not matrix.isfinite().all():
        return float("nan"), float("nan")
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), float(vectors[-1, -1])
