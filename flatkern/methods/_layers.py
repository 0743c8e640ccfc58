"""Layers with low-rank adapters as methods see them, and the gradients of weights inside them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatkern.methods._ranks import Ranks, dense
from flatkern.methods.base import Method
from flatkern.nn import shards
from flatkern.nn.names import named_modules
from flatkern.nn.parameters import LoRAParameter
from flatkern.nn.sites import site_of


@dataclass(frozen=True, eq=False)
class Pair:
    """Adapters A [r, n] and B [m, r], both trained, that add s B A to a layer's weight.

    Attributes:
        name: of the layer; in a layer of PEFT's followed by the adapter's.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def learns(self) -> bool:
        """Whether this step has gradients for it."""
        return self.A.grad is not None and self.B.grad is not None


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """A `LoRALinear`, or one of PEFT's LoRA layers, attached to or not.

    Attributes:
        pairs: those of the active adapters that are trained; none in NoRA, B D A and AdaLoRA,
            whose products have more factors.
        adapters: all parameters of its adapters that are trained.
        linear: whether its output is x W'^T + b.
    """

    name: str
    module: nn.Module
    pairs: list[Pair] = field(default_factory=list)
    adapters: list[nn.Parameter] = field(default_factory=list)
    linear: bool = True


# What a method may need of a layer, an attribute of `LoRALayer`, in words.
_NEEDED = {
    "linear": "LoRALinear layers, or PEFT's over linear ones",
    "pairs": "LoRALinear layers, or PEFT's LoRA layers, whose lora_A and lora_B are trained, "
    "with nothing between them",
    "adapters": "LoRALinear layers, or PEFT's LoRA layers, with adapters that are trained",
}


def lora_layers(method: Method, needed: str) -> list[LoRALayer]:
    """The layers of the method's model that have what is needed: linear, pairs or adapters.

    Raises:
        ValueError: there are none.
    """
    found = [layer for name, module in named_modules(method.model) for layer in _of(name, module)]
    layers = [layer for layer in found if getattr(layer, needed)]
    if not layers:
        raise ValueError(
            f"{type(method).__name__}: model must have {_NEEDED[needed]}, got none; see "
            "flatkern.nn.replace_linear"
        )
    return layers


def _of(name: str, module: nn.Module) -> Iterator[LoRALayer]:
    if isinstance(module, LoRAParameter):
        own = [part for part in module.adapters().values() if part.requires_grad]
        yield LoRALayer(name, module, [], own, linear=False)
    elif site_of(module) is module:
        own = [part for part in module.adapters().values() if part.requires_grad]
        A, B = module.lora_A, module.lora_B
        trained = A.requires_grad and B.requires_grad and module.products is None
        pairs = [Pair(name, A, B, module.scaling)] if trained else []
        yield LoRALayer(name, module, pairs, own)
    elif _is_peft(module):
        own = [
            part
            for key, part in module.named_parameters()
            if part.requires_grad and key.split(".")[0] != "base_layer"
        ]
        yield LoRALayer(name, module, list(_peft_pairs(name, module)), own, _is_linear(module))


def _is_peft(module: nn.Module) -> bool:
    # Told by what it has: methods import no other package.
    parts = module._modules
    return "base_layer" in parts and "lora_A" in parts and hasattr(module, "active_adapters")


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer()
    sizes = all(isinstance(getattr(module, n, None), int) for n in ("in_features", "out_features"))
    other = any(hasattr(base, name) for name in ("kernel_size", "num_embeddings", "num_heads"))
    # A layer of PEFT's over a parameter of a module, such as stacked experts, has a name for it.
    return sizes and not other and not hasattr(module, "parameter_name")


def _peft_pairs(name: str, module: nn.Module) -> Iterator[Pair]:
    if not _is_linear(module) or "lora_E" in module._modules:
        return
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if A.requires_grad and B.requires_grad:
                # A tensor after PEFT's prepare_model_for_compiled_hotswap.
                yield Pair(f"{name}.{adapter}", A, B, float(module.scaling[adapter]))


class WeightGradient:
    """G = sum of dy^T x over the tokens of a weight's layers, its gradient [m, n].

    Kept as its factors x [tokens, n] and dy [tokens, m] until they are larger than G, as G from
    then on.
    """

    def __init__(self, module: nn.Module) -> None:
        """No tokens yet: G is 0.

        Args:
            module: a layer of the weight.
        """
        self._shape = module.out_features, module.in_features
        first = next(module.parameters())
        dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
        self._like = {
            "device": first.device,
            "dtype": torch.float64 if torch.float64 in dtypes else torch.float32,
        }
        self._x: list[Tensor] = []
        self._dy: list[Tensor] = []
        self._dense: Tensor | None = None

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Count the tokens x [..., n] with the gradients dy [..., m] of their outputs."""
        rows, columns = self._shape
        self._x.append(x.reshape(-1, columns))
        self._dy.append(dy.detach().reshape(-1, rows))
        tokens = sum(part.shape[0] for part in self._x)
        if self._dense is not None or tokens * (rows + columns) > rows * columns:
            self._sum_up()

    def average(self, ranks: Ranks) -> None:
        """Let G be its mean over the ranks, on each of which it is that of its own tokens."""
        if ranks.size > 1:
            self._sum_up()
            self._dense = ranks.mean(self._dense)

    def norm(self) -> Tensor:
        """||G||, Frobenius."""
        if self._dense is not None:
            return self._dense.norm()
        if not self._x:
            return torch.zeros((), **self._like)
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
        """sum_j G_ij^2 of every row, [m]."""
        if self._dense is not None:
            return row_squares(self._dense)
        if not self._x:
            return torch.zeros(self._shape[0], **self._like)
        x, dy = self._factors()
        with _no_autocast(x):
            return ((x @ x.t() @ dy) * dy).sum(0).clamp_min(0)

    def _sum_up(self) -> None:
        if self._dense is None:
            self._dense = torch.zeros(self._shape, **self._like)
        if self._x:
            x, dy = self._factors()
            with _no_autocast(x):
                self._dense = self._dense + dy.t() @ x
            self._x, self._dy = [], []

    def _factors(self) -> tuple[Tensor, Tensor]:
        """All tokens, in float32 or wider."""
        x, dy = torch.cat(self._x), torch.cat(self._dy)
        return x.to(self._like["dtype"]), dy.to(self._like["dtype"])


def row_squares(gradient: Tensor) -> Tensor:
    """The sum of squares over each row of dim0 x rest, float32 or wider."""
    gradient = dense(gradient)
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.reshape(wide.shape[0] if wide.dim() else 1, -1).abs().square().sum(1)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


@contextlib.contextmanager
def recording(gradients: dict[nn.Module, WeightGradient], of_noisy: bool = False) -> Iterator[None]:
    """Backwards inside add what they see of the modules to their gradients.

    Args:
        gradients: of modules that give x W'^T + b; modules of one weight share theirs.
        of_noisy: whether it is that of the weight that takes noise, d times that of W' with the
            `row_factor` d of the window that the forward is in.
    """

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            x = _input(args, kwargs).detach()
            if shards.is_sharded(x) or shards.is_sharded(output):
                raise ValueError(
                    "methods: model must not be tensor parallel where gradients of merged weights "
                    f"are taken, got DTensors in {type(module).__name__}"
                )
            d = site_of(module).row_factor() if of_noisy else 1.0
            d = d.detach() if isinstance(d, Tensor) else d
            output.register_hook(lambda dy: gradients[module].add(x, dy * d))

    with _forward_hooks(gradients, record):
        yield


@contextlib.contextmanager
def adding(factors: dict[nn.Module, tuple[WeightGradient, Tensor]]) -> Iterator[None]:
    """The modules as if factor G were added to their weights, without rounding; none is written."""

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        gradient, factor = factors[module]
        return (output + factor * gradient.product(_input(args, kwargs))).to(output.dtype)

    with _forward_hooks(factors, add):
        yield


def _input(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _forward_hooks(modules, hook) -> Iterator[None]:
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
