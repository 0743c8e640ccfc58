"""Gradients in the weights of a scope, frozen ones included, and what is found with them."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern.landscape._evaluate import LossFn, as_found, number
from flatkern.landscape._weights import Shift, Weight
from flatkern.nn import shards


def check_differentiable(op: str, weights: list[Weight]) -> None:
    """TypeError unless every weight is a plain parameter of elements that autograd can reach."""
    for weight in weights:
        what = None
        if weight.quantized is not None:
            what = f"stored as {weight.quantized.format}"
        elif shards.is_sharded(weight.held):
            what = "sharded, and FSDP and tensor parallelism have no such derivatives"
        if what is not None:
            raise TypeError(
                f"{op}: model must hold every weight in scope as its elements, whole, to be "
                f"differentiated in them, got {weight.name} that is {what}; take scope='lora', or "
                "average_flatness, which needs no gradient"
            )


class Derivatives:
    """The loss and its derivatives in the weights of a scope, inside `open`."""

    def __init__(self, op: str, model: nn.Module, loss_fn: LossFn, weights: list[Weight]) -> None:
        """Nothing is done yet; the weights have passed `check_differentiable`."""
        self._op, self._model, self._loss_fn = op, model, loss_fn
        self.parameters = list({id(w.held): w.held for w in weights}.values())

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Eval mode, gradients in every weight; all as before afterwards."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters]
        try:
            with as_found(self._op, self._model, self._loss_fn) as self._call:
                for parameter in self.parameters:
                    parameter.requires_grad_(True)
                # The fused kernels of attention have no second derivative.
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                    yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def loss(self) -> Tensor:
        """With its graph."""
        value = self._call()
        number(self._op, value)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ValueError(
                f"{self._op}: loss_fn must return a loss that depends on the weights in scope and "
                "is made with gradients (no torch.no_grad, no float())"
            )
        return value.reshape(())

    def gradient(self, loss: Tensor, graph: bool = False) -> list[Tensor]:
        """Of every parameter; zeros where the loss does not depend on it."""
        found = torch.autograd.grad(
            loss, self.parameters, create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return list(found)


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Over all tensors together, summed up in float64."""
    return sum(
        float(torch.sum(a.detach() * b.detach(), dtype=torch.float64))
        for a, b in zip(one, other, strict=True)
    )


class Ascent:
    """The largest loss that gradient ascent finds on a ball around the weights."""

    def __init__(self, op: str, model: nn.Module, loss_fn: LossFn, weights: list[Weight]) -> None:
        """Weights that have passed `check`."""
        self._derivatives = Derivatives(op, model, loss_fn, weights)
        self._weights = {id(weight.held): weight for weight in weights}

    check = staticmethod(check_differentiable)

    def rise(self, rho: float, steps: int, start: list[Shift | None]) -> float:
        """max L(W + delta) - L(W) over the points that at most `steps` steps pass.

        Args:
            rho: length of delta.
            steps: forward and backward passes beside the first.
            start: a direction for where the gradient at the weights is 0.
        """
        parameters = self._derivatives.parameters
        clean = [parameter.detach().clone() for parameter in parameters]
        shifts = dict(zip(self._weights, start, strict=True))
        with self._derivatives.open():
            try:
                loss = self._derivatives.loss()
                plain, best = float(loss.detach()), float("-inf")
                step = self._derivatives.gradient(loss)
                del loss
                if not dot(step, step) > 0:
                    step = [
                        self._weights[id(p)].shifted(p, shifts[id(p)]) - c
                        for p, c in zip(parameters, clean, strict=True)
                    ]
                for _ in range(steps):
                    length = dot(step, step) ** 0.5
                    if not 0 < length < float("inf"):
                        break
                    with torch.no_grad():
                        for p, c, s in zip(parameters, clean, step, strict=True):
                            p.copy_(c + s * (rho / length))
                    loss = self._derivatives.loss()
                    rise = float(loss.detach()) - plain
                    gained, best = rise - best, max(rise, best)
                    # NaN ends it as well.
                    if not gained > 1e-5 * abs(best):
                        break
                    step = self._derivatives.gradient(loss)
            finally:
                with torch.no_grad():
                    for p, c in zip(parameters, clean, strict=True):
                        p.copy_(c)
        return best if best > float("-inf") else float("nan")
