"""The weights of a model that take noise, and what happens to each of them in a window."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatkern import _backend
from flatkern.nn.sites import Quantized, Site
from flatkern.noise import shards
from flatkern.noise.fisher import Fisher
from flatkern.noise.guards import Guard, late_backward_guard
from flatkern.noise.keep import Keeper, Kept, keeper_of
from flatkern.noise.rows import Rows
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops._library import bump_version, bump_versions

# As residuals say it.
WRITTEN = "weight is not what perturb_ left"


@dataclass(eq=False)
class Target:
    """One weight under noise. While a window is open, `layer._window` of its layers is this.

    Attributes:
        name: of the weight in the unwrapped model.
        number: the tensor number in its noise keys.
        layers: the sites whose base weight it is, if any.
        owners: every (module, parameter name) that holds the weight.
        strategy: the name of what gives its scale.
        merged: whether that is the scale of W' = W + s B A, with the first layer's adapters.
        rows: which elements share a scale.
        row_scale: c of the whole weight, float32 [m], at a fixed address.
        key: int64 [4], a row of its device's key table.
        backend: the implementation that serves the open window.
        sharded_linear: what layers call in place of the op, while the weight is sharded.
        noisy: whether `layers` add the noise in their forward.
        perturbed: whether the noise is written in the weight; `keeper` has the clean bits.
        written: whether something else wrote the weight since.
        called: whether one of `layers` made its product in the open window.
        traced: called when a compiler traces a layer's product.
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
    rows: Rows
    row_scale: Tensor | None = None
    key: Tensor | None = None
    backend: str = ""
    sharded_linear: Callable[..., Tensor] | None = None
    noisy: bool = False
    perturbed: bool = False
    written: bool = False
    called: bool = False
    traced: Callable[[], None] | None = None
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
        """What this rank holds of the weight, as the matrix that noise sees."""
        part = shards.part_of(self.weight)
        if not self.rows.stacked:
            return part
        return shards.Part(self.rows.fold(part.local), part.row * self.weight.shape[1], 0)

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
        self.written = self.called = False
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
            self.row_scale if self.rows.columns else part.rows_of(self.row_scale),
            self.key,
            self._largest_scale,
            self.elementwise,
            part.row,
            part.col,
            self.rows,
        )

    def _largest_scale(self) -> Tensor:
        return self.part.rows_of(_row_scales([self], self.largest)[0])

    def guard(self) -> None:
        """From here on noise may be written in the weight: an error may leave it half written."""
        self.perturbed = True
        sharded = shards.is_sharded(self.weight)
        watch = late_backward_guard(self.name, self.key) if sharded else None
        for module, name in self.owners:
            if watch is not None:
                self.hooks.append(module.register_forward_hook(watch))
            guard = Guard(self, name)
            self.hooks.append(module.register_state_dict_post_hook(guard))
            self.hooks.append(module.register_load_state_dict_pre_hook(guard.refuse_load))
            if not self.keeper.survives_casts:
                module._apply = guard.refuse_cast

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
        self.perturbed = self.written = False

    def abandon(self) -> None:
        """Keep what stands in the weight in place of the clean bits."""
        self.keeper = None
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own operands at its first window: rows of a table do not survive."""
        return self.__dict__ | {"row_scale": None, "key": None, "keeper": None}


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
                rows = target.rows.count(target.shape)
                target.row_scale = torch.zeros(rows, dtype=torch.float32, device=device)
    return tables


def scale(targets: list[Target], sigma: float, largest: float) -> None:
    """Fill the row scales from the clean weights; later windows have a sigma up to `largest`."""
    torch._foreach_copy_([target.row_scale for target in targets], _row_scales(targets, sigma))
    for target in targets:
        target.largest = largest


def _row_scales(targets: list[Target], sigma: float) -> list[Tensor]:
    scales: dict[Target, Tensor] = {}
    for (strategy, merged, _), group in _grouped(targets, _scaled_alike):
        # Detached here, not under no_grad: Ctrl-C at the end of a with block would leave it on.
        layers = [target.layers[0] for target in group] if merged else []
        factors = [[factor.detach() for factor in layer.factors()] for layer in layers]
        found = STRATEGIES[strategy](
            [target.rows.by_row(target.elements()) for target in group],
            [lora_A for lora_A, _ in factors] or None,
            [lora_B for _, lora_B in factors] or None,
            [layer.scaling for layer in layers] or [1.0] * len(group),
            sigma,
        )
        scales |= zip(group, found, strict=True)
    for target in targets:
        if target.fisher is not None:
            scales[target] = target.fisher.divide(target.name, scales[target])
    return [scales[target] for target in targets]


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
            before, local = target.keeper, target.part.local
            target.keeper = keeper_of(target.restore, local, target.rows, before)
    for (backend, keeper, _), group in _grouped(clean, _kind):
        with _backend.backend(backend):
            keeper.prepare([target.kept() for target in group])
    for target in clean:
        target.guard()
    for (backend, keeper, _), group in _grouped(clean, _kind):
        with _backend.backend(backend):
            keeper.perturb([target.kept() for target in group])
    # Not before all are written: weights may overlap.
    for (_, keeper, _), group in _grouped(clean, _kind):
        keeper.seal([target.kept() for target in group])


def hide(targets: list[Target]) -> None:
    """Let the layers see the clean weights: the exact bits.

    RuntimeError if something else wrote some of them since `show`: those are left alone, and all
    others are clean.
    """
    for target in targets:
        target.noisy = False
    perturbed = [target for target in targets if target.perturbed]
    for (backend, keeper, _), group in _grouped([t for t in perturbed if not t.written], _kind):
        with _backend.backend(backend):
            found = keeper.written([target.kept() for target in group])
        for target, written in zip(group, found, strict=True):
            target.written = written
    own = [target for target in perturbed if not target.written]
    for (backend, keeper, _), group in reversed(_grouped(own, _kind)):
        with _backend.backend(backend):
            keeper.restore([target.kept() for target in group])
    for target in own:
        target.release()
    names = list(dict.fromkeys(target.name for target in perturbed if target.written))
    if names:
        raise RuntimeError(written_inside(names))


def written_inside(names: list[str]) -> str:
    """The message of a window that something else wrote weights in."""
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"WeightNoise: {WRITTEN} in {listed}: something else wrote there inside the window, such "
        "as an optimizer step, load_state_dict or a copy into .data. Every other weight is "
        "restored exactly; these are left as they stand, and discard() ends the window and keeps "
        "them (without this object: flatkern.close(model, discard=True)). Step the optimizer after "
        "the window is closed"
    )


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
    """Whether what `allocate` gave still serves the weight, which may be another by now."""
    if target.key is None or target.key.device != target.weight.device:
        return False
    return len(target.row_scale) == target.rows.count(target.shape)
