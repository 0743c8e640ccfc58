"""LoRA layers as methods see them, and the gradient of a frozen weight inside one."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flatkern.methods.base import Method
from flatkern.nn import LoRALinear


def lora_layers(method: Method, *trained: str) -> dict[str, LoRALinear]:
    """The LoRALinear layers of the method's model by name, of which these adapters are trained.

    Raises:
        ValueError: there are none.
    """
    layers = {
        name: module
        for name, module in method.model.named_modules()
        if isinstance(module, LoRALinear)
        and all(getattr(module, part).requires_grad for part in trained)
    }
    if not layers:
        whose = f" whose {' and '.join(trained)} are trained" if trained else ""
        raise ValueError(
            f"{type(method).__name__}: model must have LoRALinear layers{whose}, got none; "
            "see flatkern.nn.replace_linear"
        )
    return layers


class WeightGradient:
    """G = sum of dy^T x over the tokens of one layer, the gradient [m, n] of its merged weight.

    Kept as its factors x [tokens, n] and dy [tokens, m] until they are larger than G, as G from
    then on.
    """

    def __init__(self, layer: LoRALinear) -> None:
        """No tokens yet: G is 0."""
        self.layer = layer
        self._shape = layer.weight.shape
        self._x: list[Tensor] = []
        self._dy: list[Tensor] = []
        self._dense: Tensor | None = None

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Count the tokens x [..., n] with the gradients dy [..., m] of their outputs."""
        rows, columns = self._shape
        self._x.append(x.reshape(-1, columns))
        self._dy.append(dy.detach().reshape(-1, rows))
        tokens = sum(part.shape[0] for part in self._x)
        if self._dense is None and tokens * (rows + columns) <= rows * columns:
            return
        x, dy = self._factors()
        with _no_autocast(x):
            product = dy.t() @ x
        self._dense = product if self._dense is None else self._dense + product
        self._x, self._dy = [], []

    def norm(self) -> Tensor:
        """||G||, Frobenius."""
        if self._dense is not None:
            return self._dense.norm()
        if not self._x:
            return torch.zeros((), device=self.layer.weight.device)
        x, dy = self._factors()
        with _no_autocast(x):
            return ((x @ x.t()) * (dy @ dy.t())).sum().clamp_min(0).sqrt()

    def product(self, x: Tensor) -> Tensor:
        """x G^T for x [..., n]."""
        with _no_autocast(x):
            if self._dense is not None:
                return x.to(self._dense.dtype) @ self._dense.t()
            if not self._x:
                return x.new_zeros((*x.shape[:-1], self._shape[0]))
            own, dy = self._factors()
            return (x.to(own.dtype) @ own.t()) @ dy

    @torch.no_grad()
    def row_squares(self) -> Tensor:
        """sum_j (d_i G_ij)^2 of every row, [m]: of the gradient of the weight that takes noise.

        d is the layer's `row_factor`, in the window that its forwards were in.
        """
        return self._row_squares() * self.layer.row_factor() ** 2

    def _row_squares(self) -> Tensor:
        if self._dense is not None:
            return row_squares(self._dense)
        if not self._x:
            return torch.zeros(self._shape[0], device=self.layer.weight.device)
        x, dy = self._factors()
        with _no_autocast(x):
            return ((x @ x.t() @ dy) * dy).sum(0).clamp_min(0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """All tokens, in float32 or wider."""
        x, dy = torch.cat(self._x), torch.cat(self._dy)
        wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
        return x.to(wide), dy.to(wide)


def row_squares(gradient: Tensor) -> Tensor:
    """The sum of squares over each row of dim0 x rest, float32 or wider."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.reshape(wide.shape[0] if wide.dim() else 1, -1).square().sum(1)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


@contextlib.contextmanager
def recording(gradients: dict[LoRALinear, WeightGradient]) -> Iterator[None]:
    """Backwards inside add what they see of the layers to their gradients."""

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda dy: gradients[layer].add(x, dy))

    with _forward_hooks(gradients, record):
        yield


@contextlib.contextmanager
def adding(gradients: dict[WeightGradient, Tensor]) -> Iterator[None]:
    """The layers as if factor G were added to their weights, without rounding; none is written."""
    by_layer = {gradient.layer: (gradient, factor) for gradient, factor in gradients.items()}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gradient, factor = by_layer[layer]
        return (output + factor * gradient.product(inputs[0])).to(output.dtype)

    with _forward_hooks(by_layer, add):
        yield


@contextlib.contextmanager
def _forward_hooks(layers, hook) -> Iterator[None]:
    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
