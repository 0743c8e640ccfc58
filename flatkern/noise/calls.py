"""What ran in windows: which layers made their product, which only had their weights read.

A virtual window is seen by whoever calls a layer. Code that reads `layer.weight` and multiplies by
itself sees no noise, and nothing else would tell.
"""

import re
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from flatkern.nn.names import named_modules
from flatkern.noise.state import State
from flatkern.noise.targets import Target

# The models of which a compiler has traced layers: compiled code leaves no mark.
_TRACED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
# A key of its own among the hooks of a model, the same in every window: compilers guard on it.
_HOOK = "flatkern"
# Noisy windows without a call after which a layer is named although its like were called.
_PATIENCE = 100


class Calls:
    """The calls of the layers of one `WeightNoise`.

    A layer is silent if it has been called in no window in which the model's forward ran (or other
    layers were called). Where others of its kind were called, those whose names differ only in
    numbers of a ModuleList, such as experts or the layers that LayerDrop leaves out, that takes
    100 windows, else one. A model that was compiled leaves no trace: none of its layers is silent.
    Where no forward ran at all, in a first window, that is said instead, and no layer is silent.

    Attributes:
        silent: the names of the weights of silent layers.
    """

    def __init__(self, model: nn.Module, targets: list[Target]) -> None:
        """Nothing has run yet."""
        self.silent: list[str] = []
        self._model = model
        self._hook = _Hook()
        layers = [target for target in targets if target.layers]
        self._unseen = set(layers)
        self._kinds_seen: set[str] = set()
        self._windows = 0
        self._said_idle = self._said_steps = False
        self._is_watched = False
        self._stepped: list[int] = []
        sequences = {n for n, m in named_modules(model) if isinstance(m, nn.Sequential)}
        self._kinds = {target: _kind(target.name, sequences) for target in layers}

    def watch(self, noisy: bool) -> None:
        """Note from here on whether the model's forward runs, or no longer."""
        hooks = self._model._forward_pre_hooks
        if noisy:
            self._is_watched = True
            hooks[_HOOK] = self._hook
        elif hooks.get(_HOOK) is self._hook:
            del hooks[_HOOK]

    def begin(self) -> None:
        """A window opens."""
        self._hook.ran = self._is_watched = False
        self._stepped.clear()

    def expect_none(self) -> None:
        """No forward is meant to run in the open window: this rank has no batch for it."""
        self._is_watched = False

    def end(self, op: str, states: list[State]) -> None:
        """A window whose noise is not zero closes; UserWarning, once for each silent layer."""
        called = {state.target for state in states if state.called} if self._unseen else set()
        called &= self._unseen
        self._unseen -= called
        self._kinds_seen |= {self._kinds[target] for target in called}
        gone = {target.name for target in called}
        self.silent = [name for name in self.silent if name not in gone]
        if not self._unseen or self._model in _TRACED:
            return
        if not (called or self._hook.ran):
            self._say_idle(op)
            return
        self._windows += 1
        late = self._windows >= _PATIENCE
        new = [
            target.name
            for target in self._kinds
            if target in self._unseen
            and target.name not in self.silent
            and (late or self._kinds[target] not in self._kinds_seen)
        ]
        if new:
            self.silent += new
            more = f" and {len(new) - 8} more" if len(new) > 8 else ""
            warnings.warn(
                f"{op}: no noise reached {', '.join(sorted(new)[:8])}{more}: the layers were not "
                "called in this window. Code that reads a layer's weight sees virtual noise "
                'nowhere; mode="inplace" shows it to every reader',
                stacklevel=3,
            )

    def _say_idle(self, op: str) -> None:
        """No forward ran: said once, and only before the first one that did.

        Later windows may replay a CUDA graph, which calls nothing.
        """
        if self._said_idle or self._windows or not self._is_watched:
            return
        if len(self._unseen) < len(self._kinds):
            return
        self._said_idle = True
        warnings.warn(
            f"{op}: a window was closed and the model's forward never ran in it, so that no noise "
            "was seen: run forward and backward between open and close (outside paused()), on the "
            "model that this object was made for",
            stacklevel=4,
        )

    def note_step(self, op: str, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped in the open window; UserWarning, once, if it had before.

        One step, before the close and not behind it, changes no bit of adapters. (A step of
        weights that noise is written in is an error at the close.)
        """
        if id(optimizer) not in self._stepped:
            self._stepped.append(id(optimizer))
            return
        if self._said_steps:
            return
        own = set(map(id, self._model.parameters()))
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            self._said_steps = True
            warnings.warn(
                f"{op}: the optimizer stepped again inside one window, so that both steps have "
                "the same noise, at the scale of the weights when it opened: open a window for "
                "every optimizer step, and step behind it",
                stacklevel=5,
            )

    def mark_traced(self) -> None:
        """A compiler traces a layer's product."""
        _TRACED.add(self._model)


def _kind(name: str, sequences: set[str]) -> str:
    """The name without the numbers by which the items of a list differ."""
    parts = name.split(".")
    return ".".join(
        "*" if re.fullmatch(r"\d+", part) and ".".join(parts[:i]) not in sequences else part
        for i, part in enumerate(parts)
    )


class _Hook:
    """A forward pre-hook of the model; in a copy of the model one that notes nothing there."""

    def __init__(self) -> None:
        self.ran = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran = True

    def __reduce__(self) -> tuple[type, tuple]:
        return _Hook, ()
