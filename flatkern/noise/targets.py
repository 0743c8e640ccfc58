"""The weights of a model that take noise, and what happens to each of them in a window."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatkern import _backend
from flatkern.nn import shards
from flatkern.nn.sites import Quantized, Site
from flatkern.noise.fisher import Fisher
from flatkern.noise.guards import Guard, late_backward_guard
from flatkern.noise.keep import Keeper, Kept, keeper_of
from flatkern.noise.rows import Rows
from flatkern.noise.scales import Scales, grouped
from flatkern.ops import _check
from flatkern.ops._library import as_matrix, bump_versions

_OP = "WeightNoise"
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
        backend: the implementation that serves its windows.
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
    guards: list[Guard] = field(default_factory=list)
    watches: list[RemovableHandle] = field(default_factory=list)
    # What was found of the weight when it was last looked at; see `serve`.
    _found: "_Found | None" = None

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

    def serve(self, backend: str) -> None:
        """Note the weight as it is now: for the windows until it is replaced, moved or cast."""
        self.backend = backend
        weight = self.weight
        self.sharded_linear = shards.noisy_linear if shards.is_sharded(weight) else None
        self._found = None
        if self.quantized is not None:
            return
        local = self.part.local
        _check.weight(_OP, local, self.name)
        if self.sharded_linear is None:
            held = self.owners[0][0]._parameters.get(self.owners[0][1])
            by_row = self.rows.by_row(weight) if not self.rows.columns else None
            self._found = _Found(held, local.data_ptr(), local.dtype, by_row)
        self.choose_keeper()
        if not self.guards:
            self.guards = [Guard(self, *owner) for owner in self.owners]

    def choose_keeper(self) -> None:
        """Take the one there is, if it serves the weight."""
        with _backend.backend(self.backend):
            self.keeper = keeper_of(self.restore, self.part.local, self.rows, self.keeper)

    def _is_found(self) -> bool:
        """Whether the weight is what `serve` noted."""
        found, (module, name) = self._found, self.owners[0]
        if found is None:
            return False
        held = module._parameters.get(name)
        return held is found.held and held.data_ptr() == found.address and held.dtype == found.dtype

    def enter(self, largest: float) -> None:
        """Belong to the window that is being opened; later ones have a sigma up to `largest`."""
        self.largest = largest
        self.written = self.called = False
        for layer in self.layers:
            layer.enter_window(self)

    def leave(self) -> None:
        """Clean weights, and no window."""
        hide([self])
        self.exit()

    def exit(self) -> None:
        """Belong to no window."""
        for layer in self.layers:
            if layer._window is self:
                # Not through Module.__setattr__, as in enter_window.
                vars(layer)["_window"] = None

    @property
    def by_row(self) -> Tensor | None:
        """What the scale is taken of, [rows, their length], where that is a view of the weight."""
        return self._found.by_row if self._is_found() else None

    def make_by_row(self) -> Tensor:
        """`by_row` of the weight as it is now."""
        return self.rows.by_row(self.elements())

    def kept(self) -> Kept:
        """What the keeper takes: of a sharded weight this rank's part."""
        if not self._is_found():
            return self._make_kept()
        found = self._found
        if found.kept is None or found.kept.keeper is not self.keeper:
            found.kept = self._make_kept()
        return found.kept

    def _make_kept(self) -> Kept:
        part = self.part
        return Kept(
            self.keeper,
            as_matrix(part.local),
            self.row_scale if self.rows.columns else part.rows_of(self.row_scale),
            self.key,
            self._largest_scale,
            self.elementwise,
            part.row,
            part.col,
            self.rows,
        )

    def _largest_scale(self) -> Tensor:
        scale = torch.empty_like(self.row_scale)
        Scales([self], [scale]).write(self.largest)
        return self.part.rows_of(scale)

    def guard(self) -> None:
        """From here on noise may be written in the weight: an error may leave it half written."""
        self.perturbed = True
        for guard in self.guards:
            guard.put(self.keeper.survives_casts)
        if self.sharded_linear is not None:
            watch = late_backward_guard(self.name, self.key)
            self.watches += [m.register_forward_hook(watch) for m, _ in self.owners]

    def abandon(self) -> None:
        """Keep what stands in the weight in place of the clean bits."""
        self.keeper = None
        release([self])

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own operands at its first window: rows of a table do not survive."""
        own = {"row_scale": None, "key": None, "keeper": None, "_found": None, "guards": []}
        return self.__dict__ | own


@dataclass
class _Found:
    """A weight that is neither sharded nor quantised; `by_row` and `kept` view its memory."""

    held: nn.Parameter
    address: int
    dtype: torch.dtype
    by_row: Tensor | None
    kept: Kept | None = None


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


def show(targets: list[Target], mode: str) -> None:
    """Let the layers see the noise."""
    for target in targets:
        target.noisy = target.is_virtual(mode)
    clean = [target for target in targets if not (target.noisy or target.perturbed)]
    for target in clean:
        if target.keeper is None:
            target.choose_keeper()
    groups = _in_groups(clean)
    for backend, keeper, _, kept in groups:
        with _backend.backend(backend):
            keeper.prepare(kept)
    for target in clean:
        target.guard()
    for backend, keeper, _, kept in groups:
        with _backend.backend(backend):
            keeper.perturb(kept)
    # Not before all are written: weights may overlap.
    for _, keeper, _, kept in groups:
        keeper.seal(kept)


def hide(targets: list[Target]) -> None:
    """Let the layers see the clean weights: the exact bits.

    RuntimeError if something else wrote some of them since `show`: those are left alone, and all
    others are clean.
    """
    for target in targets:
        target.noisy = False
    perturbed = [target for target in targets if target.perturbed]
    groups = _in_groups([target for target in perturbed if not target.written])
    for backend, keeper, group, kept in groups:
        with _backend.backend(backend):
            found = keeper.written(kept)
        for target, written in zip(group, found, strict=True):
            target.written = written
    for backend, keeper, group, kept in reversed(groups):
        pairs = zip(group, kept, strict=True)
        with _backend.backend(backend):
            keeper.restore([one for target, one in pairs if not target.written])
    release([target for target in perturbed if not target.written])
    names = list(dict.fromkeys(target.name for target in perturbed if target.written))
    if names:
        raise RuntimeError(written_inside(names))


def release(targets: list[Target]) -> None:
    """The clean bits are back in the weights."""
    # A layer whose input needs no gradient saves no weight but adapters: without this, a late
    # backward would go through unnoticed.
    layers = [layer for target in targets for layer in target.layers]
    bump_versions([part for layer in layers for part in layer.adapters().values()])
    for target in targets:
        for guard in target.guards:
            guard.remove()
        while target.watches:
            # In this order: Ctrl-C in between loses no handle, and removing twice is harmless.
            target.watches[-1].remove()
            target.watches.pop()
        target.perturbed = target.written = False


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


def _in_groups(targets: list[Target]) -> list[tuple[str, type[Keeper], list[Target], list[Kept]]]:
    """Weights that are written in one call: of one backend, keeper, form of noise and device."""
    return [
        (backend, keeper, group, [target.kept() for target in group])
        for (backend, keeper, *_), group in grouped(
            targets, lambda t: (t.backend, type(t.keeper), t.elementwise, t.key.device)
        )
    ]


def fits(target: Target) -> bool:
    """Whether what `allocate` gave still serves the weight, which may be another by now."""
    if target.key is None or target.key.device != target.weight.device:
        return False
    return len(target.row_scale) == target.rows.count(target.shape)
