"""The weights of a model that take noise, and what happens to each of them in a window."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatkern import _backend
from flatkern.nn import LoRALinear
from flatkern.noise.keep import Keeper, keeper_of
from flatkern.noise.strategies import Strategy
from flatkern.ops._library import bump_version


@dataclass(eq=False)
class Target:
    """One weight under noise. While a window is open, `layer._window` of its layers is this.

    Attributes:
        name: of the weight in the model.
        number: the tensor number in its noise keys.
        layers: those that use the weight; the first one's adapters give the scale.
        owners: every (module, parameter name) that holds the weight.
        row_scale: c, float32 [m], at a fixed address.
        key: int64 [4], a row of its device's key table.
        backend: the implementation that serves the open window.
        noisy: whether `layers` add the noise in their forward.
        perturbed: whether the noise is written in the weight; `keeper` has the clean bits.
        restore: how the clean bits are kept, see `WeightNoise`.
        largest: strategy and sigma that the room for them is measured with.
    """

    name: str
    number: int
    layers: list[LoRALinear]
    owners: list[tuple[nn.Module, str]]
    row_scale: Tensor | None = None
    key: Tensor | None = None
    backend: str = ""
    noisy: bool = False
    perturbed: bool = False
    keeper: Keeper | None = None
    restore: str | None = None
    largest: tuple[Strategy, float] | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """The weight, outside autograd; looked up each time, because it may be replaced."""
        return self.layers[0].weight.detach()

    def clean_weight(self) -> Tensor:
        """The weight without noise: a copy if noise is written in it."""
        if not self.perturbed:
            return self.weight
        with _backend.backend(self.backend):
            return self.keeper.clean(self.weight, self.row_scale, self.key)

    def scale(self, strategy: Strategy, sigma: float, largest: float) -> None:
        """Fill the row scale from the clean weight; later windows have a sigma up to `largest`."""
        self.row_scale.copy_(self._row_scale(strategy, sigma))
        self.largest = strategy, largest

    def _row_scale(self, strategy: Strategy, sigma: float) -> Tensor:
        layer = self.layers[0]
        # Detached here, not under no_grad: Ctrl-C at the end of a with block would leave it on.
        adapters = layer.lora_A.detach(), layer.lora_B.detach()
        return strategy(self.weight, *adapters, layer.scaling, sigma)

    def enter(self, backend: str) -> None:
        """Belong to the window that is being opened."""
        self.backend = backend
        for layer in self.layers:
            layer._window = self

    def show(self, mode: str) -> None:
        """Let the layers see the noise."""
        if mode == "virtual":
            self.noisy = True
        elif not self.perturbed:
            self._perturb()

    def hide(self) -> None:
        """Let the layers see the clean weight: the exact bits."""
        self.noisy = False
        if self.perturbed:
            self._restore()

    def leave(self) -> None:
        """Belong to no window; from here on a backward through this one raises."""
        self.hide()
        if self.key is not None:
            bump_version(self.key)
        for layer in self.layers:
            if layer._window is self:
                layer._window = None

    def _perturb(self) -> None:
        with _backend.backend(self.backend):
            self.keeper = keeper_of(self.restore, self.weight, self.keeper)
            self.keeper.prepare(self.weight, lambda: self._row_scale(*self.largest), self.key)
        # From here on, because an error or Ctrl-C may leave the weight half written.
        self.perturbed = True
        for module, name in self.owners:
            guard = _Guard(self, name)
            self.hooks.append(module.register_state_dict_post_hook(guard))
            self.hooks.append(module.register_load_state_dict_pre_hook(guard.refuse_load))
            if not self.keeper.survives_casts:
                module._apply = guard.refuse_cast
        with _backend.backend(self.backend):
            self.keeper.perturb(self.weight, self.row_scale, self.key)

    def _restore(self) -> None:
        with _backend.backend(self.backend):
            self.keeper.restore(self.weight, self.row_scale, self.key)
        for layer in self.layers:
            # A layer whose input needs no gradient saves no weight but adapters: without this, a
            # late backward would go through unnoticed.
            bump_version(layer.lora_A)
            bump_version(layer.lora_B)
        for module, _ in self.owners:
            module.__dict__.pop("_apply", None)
        while self.hooks:
            # In this order: Ctrl-C in between loses no handle, and removing twice is harmless.
            self.hooks[-1].remove()
            self.hooks.pop()
        self.perturbed = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own operands at its first window: rows of a table do not survive."""
        return self.__dict__ | {"row_scale": None, "key": None, "keeper": None}


class _Guard:
    """Hooks on a module whose parameter has noise written in it: none of it gets out.

    `state_dict` gives the clean bits. Copying, pickling and loading are refused, because what they
    would see or overwrite is the noisy weight.
    """

    def __init__(self, target: Target, parameter: str) -> None:
        """Guard `parameter` of the module that the hooks are put on."""
        self._target = target
        self._parameter = parameter

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        key = prefix + self._parameter
        if self._target.perturbed and key in state_dict:
            state_dict[key] = self._target.clean_weight()

    def refuse_load(self, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._require_clean("load_state_dict", f"{prefix}{self._parameter}")

    def refuse_cast(self, *args: Any, **options: Any) -> None:
        """In place of the module's `_apply`, where the clean bits follow from the noisy ones."""
        hint = 'restore="snapshot" allows it; '
        self._require_clean("casting or moving a module", self._target.name, hint)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._require_clean("copying or pickling", self._target.name)
        return super().__reduce_ex__(protocol)

    def _require_clean(self, action: str, name: str, hint: str = "") -> None:
        if self._target.perturbed:
            raise RuntimeError(
                f"WeightNoise: {action} while in-place noise is written in {name}; "
                f"{hint}close the window or use paused() (state_dict() is clean at any time)"
            )


def collect(model: nn.Module) -> list[Target]:
    """The base weight of every LoRALinear, each tensor once.

    Tensor numbers count the non-adapter parameters in `named_parameters()` order, noisy or not,
    so they do not depend on which layers were wrapped.
    """
    layers: dict[int, list[LoRALinear]] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    adapters = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(weight), []).append((module, name))
        if isinstance(module, LoRALinear):
            layers.setdefault(id(module.weight), []).append(module)
            adapters |= {id(module.lora_A), id(module.lora_B)}
    weights = [
        (name, id(weight))
        for name, weight in model.named_parameters()
        if id(weight) not in adapters
    ]
    return [
        Target(name, number, layers[weight], owners[weight])
        for number, (name, weight) in enumerate(weights)
        if weight in layers
    ]


def allocate(targets: list[Target]) -> list[Tensor]:
    """Give each target its row scale and a row of its device's key table; return the tables.

    Tables are int64 [targets on the device, 4], with the tensor numbers filled in.
    """
    tables = []
    # Ordinary tensors even if the first window is opened in inference mode: autograd saves them.
    with torch.inference_mode(False):
        for device in dict.fromkeys(target.weight.device for target in targets):
            here = [target for target in targets if target.weight.device == device]
            rows = [[0, 0, 0, target.number] for target in here]
            tables.append(torch.tensor(rows, dtype=torch.int64, device=device))
            for index, target in enumerate(here):
                target.key = tables[-1][index]
                target.row_scale = torch.zeros(
                    target.weight.shape[0], dtype=torch.float32, device=device
                )
    return tables


def fits(target: Target) -> bool:
    """Whether what `allocate` gave still serves the weight, which may have been moved."""
    return target.key is not None and target.key.device == target.weight.device


def summarise(targets: list[Target], mode: str) -> str:
    """A line for each target, then the totals."""
    rows = []
    elements = operand_bytes = kept_bytes = 0
    for target in targets:
        weight = target.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        number = f"tensor {target.number}"
        rows.append((target.name, dtype, str(list(weight.shape)), number, mode))
        elements += weight.numel()
        # float32 [m] and one key of four int64.
        operand_bytes += 4 * weight.shape[0] + 32
        kept_bytes += target.keeper.nbytes() if target.keeper is not None else 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = f"{len(rows)} weights, {elements:,} elements; {operand_bytes:,} bytes of row scales "
    total += "and keys"
    if mode != "virtual":
        total += f", {kept_bytes:,} bytes of clean bits"
    return "\n".join([*lines, total])
