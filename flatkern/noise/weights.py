"""The weights in scope of one `WeightNoise`, and what a window does to all of them."""

import contextlib

from torch import Tensor, nn

from flatkern.nn import shards
from flatkern.nn.names import named_parameters
from flatkern.noise.calls import Calls
from flatkern.noise.changes import Places, Seen, check_shards, check_weights
from flatkern.noise.fisher import Fisher
from flatkern.noise.keys import NoiseKey
from flatkern.noise.modes import check_mode
from flatkern.noise.scales import Scales
from flatkern.noise.scopes import collect
from flatkern.noise.state import WRITTEN, State, allocate, hide, show, written_inside
from flatkern.ops._library import bump_versions

_OP = "WeightNoise"
# What each scope needs, and where it comes from.
_ADAPTED = (
    "LoRALinear layers or attached PEFT layers",
    "; see flatkern.nn.replace_linear, or peft.get_peft_model and then "
    "flatkern.integrations.peft.attach",
)
_NEEDED = {"merged": _ADAPTED, "lora": _ADAPTED, "trainable": ("trainable parameters", "")}


class Weights:
    """Found when made, and again when a window opens on a model that has changed.

    Attributes:
        targets: in the model's order.
        states: what windows do to each.
        skipped: why a parameter in scope takes no noise, by its name.
        calls: which layers have been called in windows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: str,
        strategy: str,
        mode: str,
        restore: str | None,
        ranks: str,
        fisher: Fisher | None,
    ) -> None:
        """Look at the model; arguments as in `WeightNoise`.

        Raises:
            TypeError, ValueError: nothing to perturb, or weights that these arguments do not suit.
        """
        self._model = model
        self._scope, self._strategy, self._mode = scope, strategy, mode
        self._restore, self._ranks, self._fisher = restore, ranks, fisher
        self._look()

    def _look(self) -> None:
        wanted = self._scope, self._strategy, self._restore, self._fisher
        targets, skipped = collect(_OP, self._model, *wanted)
        if not targets:
            what, hint = _NEEDED.get(self._scope, ("parameters", ""))
            raise ValueError(f"{_OP}: model must have {what}, got nothing to perturb{hint}")
        check_shards(_OP, targets, self._ranks)
        check_mode(_OP, self._mode, targets)
        self.targets, self.skipped = targets, skipped
        self.calls = Calls(self._model, targets)
        self.states = [State(target) for target in targets]
        self._sites = [
            (layer, f"open on {target.name}") for target in targets for layer in target.layers
        ]
        self._seen = Seen(self._model, targets, self._scope)
        self._places = Places(targets)
        self._are_where_they_were = False
        self._tables: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        """Each weight's once."""
        return list(dict.fromkeys(target.name for target in self.targets))

    def check(self) -> None:
        """Before a window: look again where the model has changed; one error for what is gone.

        Raises:
            TypeError, ValueError: as the constructor.
            RuntimeError: a weight that had noise cannot take it any more, or its layer is merged
                or in another window.
        """
        # What FSDP has gathered may be freed at any time, and show other noise than the shards.
        shards.reshard(self._model)
        self._are_where_they_were = self._places.still()
        if not self._seen.still(weights_too=not self._are_where_they_were):
            self._are_where_they_were = False
            before = self.names
            self._look()
            now = set(self.names)
            if self._scope == "trainable":
                # Those that were frozen since are rightly out.
                now |= {n for n, p in named_parameters(self._model) if not p.requires_grad}
            lost = [name for name in before if name not in now]
            if lost:
                raise RuntimeError(
                    f"{_OP}: {', '.join(lost[:8])} had noise and cannot take it any more: the "
                    "layers were replaced, removed or quantised after this object was made; make "
                    "a new WeightNoise (with PEFT: detach, then attach again)"
                )
        if not self._are_where_they_were:
            check_weights(_OP, self.targets)
            check_shards(_OP, self.targets, self._ranks)
        for layer, action in self._sites:
            layer.require_closed(action)
        self._require_unmerged("is merged; call unmerge() first")

    def _require_unmerged(self, what: str) -> None:
        if any(layer.merged for layer, _ in self._sites):
            merged = [t.name for t in self.targets if any(layer.merged for layer in t.layers)]
            raise RuntimeError(f"{_OP}: {', '.join(merged[:8])} {what}")

    def enter(self, key: NoiseKey, sigma_t: float, largest: float) -> None:
        """Write keys and row scales: data at fixed addresses, so that nothing recompiles."""
        if not self._are_where_they_were:
            if not (self._tables and all(state.fits() for state in self.states)):
                self._tables = []  # An interruption leaves none: the next window makes them all.
                self._tables = allocate(self.states)
            for state in self.states:
                state.serve()
            self._scales = Scales(self.states)
            self._places.note()
        for table in self._tables:
            for column, word in enumerate((key.seed, key.step, key.draw)):
                table[:, column] = word
        self._scales.write(sigma_t)
        largest = max(sigma_t, largest)
        for state in self.states:
            state.enter(largest)
        self.calls.begin()

    def show(self, mode: str) -> None:
        """Let the model see the noise."""
        shards.reshard(self._model)
        show(self.states, mode)
        self.calls.watch(any(state.noisy for state in self.states))

    def resume(self, mode: str) -> None:
        """`show` again after `hide`.

        Raises:
            RuntimeError: a layer is merged.
        """
        self._require_unmerged(
            "must be unmerged before paused() ends; the window is closed, call unmerge() now"
        )
        self.show(mode)

    def hide(self) -> None:
        """Let the model see the clean weights."""
        shards.reshard(self._model)
        self.calls.watch(False)
        hide(self.states)

    def leave(self) -> None:
        """Clean weights and no window; where it is interrupted, calling it again continues.

        Raises:
            RuntimeError: something else wrote weights; all others are clean, and out of it.
        """
        # In a few calls; where one is refused, weight by weight, so that the others are restored.
        with contextlib.suppress(Exception):
            self.hide()
        # Again: that may have failed before it came to this.
        self.calls.watch(False)
        # From here on a backward through the window raises.
        bump_versions(self._tables)
        failed: dict[State, Exception] = {}
        # Backwards, so that weights which overlap in memory come out right as well.
        for state in reversed(self.states):
            try:
                state.leave()
            except Exception as error:  # the other weights must be restored all the same
                failed[state] = error
        if not failed:
            return
        lost = [state for state in self.states if WRITTEN in str(failed.get(state))]
        written = [state.target.name for state in lost]
        error = next(iter(failed.values()))
        if written:
            raise RuntimeError(written_inside(list(dict.fromkeys(written)))) from error
        raise error

    def abandon(self) -> list[str]:
        """Leave what stands in the weights that `leave` cannot restore; return their names."""
        kept = [state for state in self.states if state.perturbed]
        for state in kept:
            state.abandon()
        return list(dict.fromkeys(state.target.name for state in kept))
