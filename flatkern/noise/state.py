"""What windows do to weights: the layers add the noise, or it is written in the weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatkern import _backend
from flatkern._noise import Noise
from flatkern.nn import shards
from flatkern.noise import registry
from flatkern.noise.guards import Guard, late_backward_guard
from flatkern.noise.keep import Keeper, keeper_of
from flatkern.noise.scales import Scales, grouped
from flatkern.noise.targets import Target
from flatkern.ops import _check
from flatkern.ops._library import as_matrix, bump_versions

_OP = "WeightNoise"
# As residuals say it.
WRITTEN = "weight is not what perturb_ left"


class State:
    """A weight under noise, from window to window; nothing outside this file writes it.

    While a window is open, `layer._window` of the target's layers is this.

    Attributes:
        target: the weight.
        elementwise: that of the target.
        row_scale: c of the whole weight, float32 [m], at a fixed address.
        key: int64 [4], a row of its device's key table.
        backend: the implementation that serves its windows.
        sharded_linear: what layers call in place of the op, while the weight is sharded.
        noisy: whether the layers add the noise in their forward.
        perturbed: whether the noise is written in the weight; `keeper` has the clean bits.
        written: whether something else wrote the weight since.
        called: whether one of the layers made its product in the open window.
        keeper: what has the clean bits; None before the first window.
    """

    def __init__(self, target: Target) -> None:
        """Nothing is allocated."""
        self.target = target
        self.elementwise = target.elementwise
        self.row_scale: Tensor | None = None
        self.key: Tensor | None = None
        self.backend = ""
        self.sharded_linear: Callable[..., Tensor] | None = None
        self.noisy = self.perturbed = self.written = self.called = False
        self.keeper: Keeper | None = None
        # sigma that the room for clean bits is measured with.
        self._largest = 0.0
        self._guards: list[Guard] = []
        self._watches: list[RemovableHandle] = []
        # Where `serve` found the weight, and the keeper that knows it to be there.
        self._found: _Found | None = None
        self._bound: Keeper | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own operands at its first window: rows of a table do not survive."""
        return vars(State(self.target))

    def fits(self) -> bool:
        """Whether what `allocate` gave still serves the weight, which may be another by now."""
        target = self.target
        if self.row_scale is None or self.row_scale.device != target.weight.device:
            return False
        return len(self.row_scale) == target.rows.count(target.shape)

    def serve(self) -> None:
        """Note the weight as it is now: for the windows until it is replaced, moved or cast."""
        target, weight = self.target, self.target.weight
        self.backend = _backend.resolve(weight.device.type, target.dtype)
        self.sharded_linear = shards.noisy_linear if shards.is_sharded(weight) else None
        self._found = self._bound = None
        if target.quantized is not None:
            return
        local = target.part.local
        _check.weight(_OP, local, target.name)
        if self.sharded_linear is None:
            module, name = target.owners[0]
            by_row = target.rows.by_row(weight) if not target.rows.columns else None
            held = module._parameters.get(name)
            self._found = _Found(held, local.data_ptr(), local.dtype, by_row)
        self._choose_keeper()
        if not self._guards:
            self._guards = [Guard(self, *owner) for owner in target.owners]

    def _choose_keeper(self) -> None:
        """Take the one there is, if it serves the weight."""
        target = self.target
        with _backend.backend(self.backend):
            self.keeper = keeper_of(target.restore, target.part.local, target.rows, self.keeper)

    def _is_found(self) -> bool:
        """Whether the weight is where `serve` found it."""
        found, (module, name) = self._found, self.target.owners[0]
        if found is None:
            return False
        held = module._parameters.get(name)
        return held is found.held and held.data_ptr() == found.address and held.dtype == found.dtype

    @property
    def by_row(self) -> Tensor | None:
        """What the scale is taken of, [rows, their length], where that is a view of the weight."""
        return self._found.by_row if self._is_found() else None

    def bound(self) -> Keeper:
        """The keeper, which knows where the weight lies now: of a sharded one this rank's part."""
        is_found = self._is_found()
        if not (is_found and self._bound is self.keeper):
            noise = Noise(self.row_scale, self.key, self.elementwise)
            part = self.target.part
            if not self.target.rows.columns:
                noise = noise.part(part.row, part.local.shape[0], part.col)
            self.keeper.bind(as_matrix(part.local), noise, self._largest_scale)
            self._bound = self.keeper if is_found else None
        return self.keeper

    def _largest_scale(self) -> Tensor:
        scale = torch.empty_like(self.row_scale)
        Scales([self], [scale]).write(self._largest)
        return self.target.part.rows_of(scale)

    def enter(self, largest: float) -> None:
        """Belong to the window that is being opened; later ones have a sigma up to `largest`."""
        self._largest = largest
        self.written = self.called = False
        for layer in self.target.layers:
            layer.enter_window(self)

    def leave(self) -> None:
        """Clean weights, and no window."""
        if self.perturbed:
            hide([self])
        self.noisy = False
        for layer in self.target.layers:
            if layer._window is self:
                # Not through Module.__setattr__, as in enter_window.
                vars(layer)["_window"] = None

    def mark_called(self) -> None:
        """Note that a layer's product runs; compiled code does not note it."""
        if not torch.compiler.is_compiling():
            self.called = True
        else:
            registry.mark_traced()

    def clean_weight(self) -> Tensor:
        """The weight without noise: a copy if noise is written in it."""
        if not self.perturbed:
            return self.target.weight
        with _backend.backend(self.backend):
            return shards.like(self.bound().clean(), getattr(*self.target.owners[0]))

    def abandon(self) -> None:
        """Keep what stands in the weight in place of the clean bits."""
        self.keeper = None
        _release([self])

    def _guard(self) -> None:
        """From here on noise may be written in the weight: an error may leave it half written."""
        self.perturbed = True
        for guard in self._guards:
            guard.put(self.keeper.survives_casts)
        if self.sharded_linear is not None:
            watch = late_backward_guard(self.target.name, self.key)
            self._watches += [m.register_forward_hook(watch) for m, _ in self.target.owners]


class _Found(NamedTuple):
    """A weight that is neither sharded nor quantised; `by_row` views its memory."""

    held: nn.Parameter
    address: int
    dtype: torch.dtype
    by_row: Tensor | None


def allocate(states: list[State]) -> list[Tensor]:
    """Give each its row scale and a row of its device's key table; return the tables.

    Tables are int64 [weights on the device, 4], with the tensor numbers filled in.
    """
    tables = []
    # Ordinary tensors even if the first window is opened in inference mode: autograd saves them.
    with torch.inference_mode(False):
        for device, here in grouped(states, lambda state: state.target.weight.device):
            rows = [[0, 0, 0, state.target.number] for state in here]
            tables.append(torch.tensor(rows, dtype=torch.int64, device=device))
            for index, state in enumerate(here):
                state.key = tables[-1][index]
                rows = state.target.rows.count(state.target.shape)
                state.row_scale = torch.zeros(rows, dtype=torch.float32, device=device)
    return tables


def show(states: list[State], mode: str) -> None:
    """Let the layers see the noise."""
    for state in states:
        state.noisy = state.target.is_virtual(mode)
    clean = [state for state in states if not (state.noisy or state.perturbed)]
    for state in clean:
        if state.keeper is None:
            state._choose_keeper()
    groups = _in_groups(clean)
    for backend, kind, _, keepers in groups:
        with _backend.backend(backend):
            kind.prepare(keepers)
    for state in clean:
        state._guard()
    for backend, kind, _, keepers in groups:
        with _backend.backend(backend):
            kind.perturb(keepers)
    # Not before all are written: weights may overlap.
    for _, kind, _, keepers in groups:
        kind.seal(keepers)


def hide(states: list[State]) -> None:
    """Let the layers see the clean weights: the exact bits.

    RuntimeError if something else wrote some of them since `show`: those are left alone, and all
    others are clean.
    """
    for state in states:
        state.noisy = False
    perturbed = [state for state in states if state.perturbed]
    groups = _in_groups([state for state in perturbed if not state.written])
    for backend, kind, group, keepers in groups:
        with _backend.backend(backend):
            found = kind.written(keepers)
        for state, written in zip(group, found, strict=True):
            state.written = written
    for backend, kind, group, keepers in reversed(groups):
        pairs = zip(group, keepers, strict=True)
        with _backend.backend(backend):
            kind.restore([keeper for state, keeper in pairs if not state.written])
    _release([state for state in perturbed if not state.written])
    names = list(dict.fromkeys(state.target.name for state in perturbed if state.written))
    if names:
        raise RuntimeError(written_inside(names))


def _release(states: list[State]) -> None:
    """The clean bits are back in the weights."""
    # A layer whose input needs no gradient saves no weight but adapters: without this, a late
    # backward would go through unnoticed.
    layers = [layer for state in states for layer in state.target.layers]
    bump_versions([part for layer in layers for part in layer.adapters().values()])
    for state in states:
        for guard in state._guards:
            guard.remove()
        while state._watches:
            # In this order: Ctrl-C in between loses no handle, and removing twice is harmless.
            state._watches[-1].remove()
            state._watches.pop()
        state.perturbed = state.written = False


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


def _in_groups(states: list[State]) -> list[tuple[str, type[Keeper], list[State], list[Keeper]]]:
    """Weights that are written in one call: of one backend, keeper, form of noise and device."""
    return [
        (backend, kind, group, [state.bound() for state in group])
        for (backend, kind, *_), group in grouped(
            states, lambda s: (s.backend, type(s.keeper), s.elementwise, s.key.device)
        )
    ]
