"""The weights of a model that take noise, and what happens to each of them in a window."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from flatkern import _backend
from flatkern.nn.sites import Quantized, Site
from flatkern.noise import shards
from flatkern.noise.fisher import Fisher
from flatkern.noise.keep import Keeper, Kept, keeper_of
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops._library import bump_version, bump_versions


@dataclass(eq=False)
class Target:
    """One weight under noise. While a window is open, `layer._window` of its layers is this.

    Attributes:
        name: of the weight in the model.
        number: the tensor number in its noise keys.
        layers: the sites whose base weight it is, if any.
        owners: every (module, parameter name) that holds the weight.
        strategy: the name of what gives its scale.
        merged: whether that is the scale of W' = W + s B A, with the first layer's adapters.
        row_scale: c of the whole weight, float32 [m], at a fixed address.
        key: int64 [4], a row of its device's key table.
        backend: the implementation that serves the open window.
        sharded_linear: what layers call in place of the op, while the weight is sharded.
        noisy: whether `layers` add the noise in their forward.
        perturbed: whether the noise is written in the weight; `keeper` has the clean bits.
        restore: how the clean bits are kept, see `WeightNoise`.
        largest: sigma that the room for them is measured with.
        fisher: what divides the scale, see `Fisher`.
    """

    name: str
    number: int
    layers: list[Site]
    owners: list[tuple[nn.Module, str]]
    strategy: str
    merged: bool
    row_scale: Tensor | None = None
    key: Tensor | None = None
    backend: str = ""
    sharded_linear: Callable[..., Tensor] | None = None
    noisy: bool = False
    perturbed: bool = False
    keeper: Keeper | None = None
    restore: str | None = None
    largest: float = 0.0
    fisher: Fisher | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """The weight, outside autograd; looked up each time, because it may be replaced.

        Where it is sharded this is the DTensor, and `part` what this rank holds.
        """
        module, name = self.owners[0]
        weight = getattr(module, name).detach()
        # The ops take nothing without dimensions.
        return weight if weight.dim() else weight.view(1)

    @property
    def quantized(self) -> Quantized | None:
        """How the weight is stored, if not as its elements."""
        return self.layers[0].quantized if self.layers else None

    @property
    def shape(self) -> torch.Size:
        """Of the weight's elements."""
        return self.weight.shape if self.quantized is None else self.quantized.shape

    @property
    def dtype(self) -> torch.dtype:
        """Which implementation serves the weight goes by it."""
        return self.weight.dtype if self.quantized is None else torch.float32

    def elements(self) -> Tensor:
        """The weight, or what it is when dequantised: then a new tensor."""
        if self.quantized is None:
            return self.weight
        return self.quantized.dequantize(torch.float32).detach()

    @property
    def part(self) -> shards.Part:
        """What this rank holds of the weight."""
        return shards.part_of(self.weight)

    @property
    def elementwise(self) -> bool:
        """Whether the noise is multiplied by |W_ij|."""
        return self.strategy == "element"

    def is_virtual(self, mode: str) -> bool:
        """Whether the layers add the noise: only sites can, to their base weight."""
        return mode == "virtual" and bool(self.layers)

    def clean_weight(self) -> Tensor:
        """The weight without noise: a copy if noise is written in it."""
        if not self.perturbed:
            return self.weight
        with _backend.backend(self.backend):
            return shards.like(self.keeper.clean(self.kept()), getattr(*self.owners[0]))

    def enter(self, backend: str) -> None:
        """Belong to the window that is being opened."""
        self.backend = backend
        self.sharded_linear = shards.noisy_linear if shards.is_sharded(self.weight) else None
        for layer in self.layers:
            layer.enter_window(self)

    def leave(self) -> None:
        """Belong to no window; from here on a backward through this one raises."""
        hide([self])
        if self.key is not None:
            bump_version(self.key)
        for layer in self.layers:
            if layer._window is self:
                layer._window = None

    def kept(self) -> Kept:
        """What the keeper takes: of a sharded weight this rank's part."""
        part = self.part
        return Kept(
            self.keeper,
            part.local,
            part.rows_of(self.row_scale),
            self.key,
            self._largest_scale,
            self.elementwise,
            part.row,
            part.col,
        )

    def _largest_scale(self) -> Tensor:
        return self.part.rows_of(_row_scales([self], self.largest)[0])

    def guard(self) -> None:
        """From here on noise may be written in the weight: an error may leave it half written."""
        self.perturbed = True
        sharded = shards.is_sharded(self.weight)
        for module, name in self.owners:
            if sharded:
                self.hooks.append(module.register_forward_hook(self._watch))
            guard = _Guard(self, name)
            self.hooks.append(module.register_state_dict_post_hook(guard))
            self.hooks.append(module.register_load_state_dict_pre_hook(guard.refuse_load))
            if not self.keeper.survives_casts:
                module._apply = guard.refuse_cast

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let no backward through this output once the window is closed.

        FSDP gathers weights behind autograd's back, so their version counters tell it nothing.
        """
        key, version = self.key, self.key._version

        def refuse_late(grad: Tensor) -> None:
            if key._version != version:
                raise RuntimeError(
                    f"WeightNoise: backward through {self.name} after its window was closed; "
                    "the weight that it needs is no longer noisy"
                )

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(refuse_late)

    def release(self) -> None:
        """The clean bits are back in the weight."""
        # A layer whose input needs no gradient saves no weight but adapters: without this, a late
        # backward would go through unnoticed.
        bump_versions([t for layer in self.layers for t in layer.adapters().values()])
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
                target.row_scale = torch.zeros(target.shape[0], dtype=torch.float32, device=device)
    return tables


def scale(targets: list[Target], sigma: float, largest: float) -> None:
    """Fill the row scales from the clean weights; later windows have a sigma up to `largest`."""
    torch._foreach_copy_([target.row_scale for target in targets], _row_scales(targets, sigma))
    for target in targets:
        target.largest = largest


def _row_scales(targets: list[Target], sigma: float) -> list[Tensor]:
    scales: dict[int, Tensor] = {}
    for (strategy, merged, _), group in _grouped(targets, _scaled_alike):
        # Detached here, not under no_grad: Ctrl-C at the end of a with block would leave it on.
        layers = [target.layers[0] for target in group] if merged else []
        factors = [[factor.detach() for factor in layer.factors()] for layer in layers]
        found = STRATEGIES[strategy](
            [target.elements() for target in group],
            [lora_A for lora_A, _ in factors] or None,
            [lora_B for _, lora_B in factors] or None,
            [layer.scaling for layer in layers] or [1.0] * len(group),
            sigma,
        )
        scales |= {target.number: c for target, c in zip(group, found, strict=True)}
    for target in targets:
        if target.fisher is not None:
            scales[target.number] = target.fisher.divide(target.name, scales[target.number])
    return [scales[target.number] for target in targets]


def _scaled_alike(target: Target) -> tuple[str, bool, int | None]:
    """What weights have in common whose scales are found in one call: quantised ones one by one,
    because their elements take memory.
    """
    return target.strategy, target.merged, None if target.quantized is None else target.number


def show(targets: list[Target], mode: str) -> None:
    """Let the layers see the noise."""
    for target in targets:
        target.noisy = target.is_virtual(mode)
    clean = [target for target in targets if not (target.noisy or target.perturbed)]
    for target in clean:
        with _backend.backend(target.backend):
            target.keeper = keeper_of(target.restore, target.part.local, target.keeper)
    for (backend, keeper, _), group in _grouped(clean, _kind):
        with _backend.backend(backend):
            keeper.prepare([target.kept() for target in group])
    for target in clean:
        target.guard()
    for (backend, keeper, _), group in _grouped(clean, _kind):
        with _backend.backend(backend):
            keeper.perturb([target.kept() for target in group])


def hide(targets: list[Target]) -> None:
    """Let the layers see the clean weights: the exact bits."""
    for target in targets:
        target.noisy = False
    perturbed = [target for target in targets if target.perturbed]
    for (backend, keeper, _), group in reversed(_grouped(perturbed, _kind)):
        with _backend.backend(backend):
            keeper.restore([target.kept() for target in group])
    for target in perturbed:
        target.release()


def _kind(target: Target) -> tuple[str, type[Keeper], bool]:
    """What weights have in common that are written in one call."""
    return target.backend, type(target.keeper), target.elementwise


def _grouped(
    targets: list[Target], kind: Callable[[Target], Hashable]
) -> list[tuple[Any, list[Target]]]:
    """The targets of each kind, in order."""
    groups: dict[Hashable, list[Target]] = {}
    for target in targets:
        groups.setdefault(kind(target), []).append(target)
    return list(groups.items())


def fits(target: Target) -> bool:
    """Whether what `allocate` gave still serves the weight, which may have been moved."""
    return target.key is not None and target.key.device == target.weight.device


def summarise(targets: list[Target], mode: str) -> str:
    """A line for each target, then the totals."""
    rows = []
    elements = operand_bytes = kept_bytes = 0
    for target in targets:
        shape, quantized = target.shape, target.quantized
        dtype = str(target.weight.dtype).removeprefix("torch.")
        stored = dtype if quantized is None else quantized.format
        number = f"tensor {target.number}"
        own_mode = mode if target.layers else "inplace"
        rows.append((target.name, stored, str(list(shape)), number, own_mode))
        elements += shape.numel()
        # float32 [m] and one key of four int64.
        operand_bytes += 4 * shape[0] + 32
        kept_bytes += target.keeper.nbytes() if target.keeper is not None else 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = f"{len(rows)} weights, {elements:,} elements; {operand_bytes:,} bytes of row scales "
    total += "and keys"
    if not all(target.is_virtual(mode) for target in targets):
        total += f", {kept_bytes:,} bytes of clean bits"
    return "\n".join([*lines, total])
