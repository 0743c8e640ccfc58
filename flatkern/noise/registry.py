"""The windows that are open, so that one whose owner is lost can be closed."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as _STEP_HOOKS
from torch.utils.hooks import RemovableHandle

from flatkern.ops import _check

_OPEN: "weakref.WeakSet[Any]" = weakref.WeakSet()
# As torch.optim's register_optimizer_step_post_hook makes it; once, which costs windows less.
_HANDLE = RemovableHandle(_STEP_HOOKS)


def register(noise: Any) -> None:
    """Its window is open."""
    _OPEN.add(noise)
    _STEP_HOOKS[_HANDLE.id] = _note_step


def unregister(noise: Any) -> None:
    """Its window is closed."""
    _OPEN.discard(noise)
    if not _OPEN:
        _HANDLE.remove()


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step of any optimizer while a window is open."""
    for noise in list(_OPEN):
        noise.note_step(optimizer)


def require_free(op: str, targets: list[Any], owner: Any = None) -> None:
    """RuntimeError if another object than the owner has a window open on one of the weights."""
    if not _OPEN:
        return
    own = {(id(module), part): target.name for target, module, part in _held(targets)}
    for other in _OPEN:
        for _, module, part in _held(other._targets) if other is not owner else ():
            if (id(module), part) in own:
                raise RuntimeError(
                    f"{op}: open on {own[id(module), part]} inside a noise window of another "
                    "WeightNoise; close that one first: flatkern.close(model) does, whoever opened "
                    "it"
                )


def mark_traced() -> None:
    """A compiler traces a layer's product in an open window.

    All open ones are marked: torch 2.11's compiler can run no more than a plain function without
    arguments while it traces, so nobody can say here which window it is.
    """
    for noise in _OPEN:
        noise._weights.calls.mark_traced()


# As torch.compiler.assume_constant_result does, which imports the compiler: run when a compiler
# traces the call, and leave nothing of it in what is compiled.
mark_traced._dynamo_marked_constant = True


def close(model: nn.Module, *, discard: bool = False) -> None:
    """Close the windows that are open on a model's weights, whoever opened them.

    For windows whose `WeightNoise` is out of reach, after an interrupted run, say. The weights are
    exactly clean afterwards; the step counters stay where they are, because no step was finished.
    Nothing happens if no window is open.

    Args:
        model: or any part of it, or what wraps it.
        discard: as `WeightNoise.discard`: keep what something else wrote inside the window.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: something else wrote a weight inside the window; all others are restored.
    """
    _check.kinds("close", nn.Module, model=model)
    modules = set(map(id, model.modules()))
    for noise in list(_OPEN):
        if any(id(module) in modules for _, module, _ in _held(noise._targets)):
            noise.discard() if discard else noise.abandon()


def _held(targets: list[Any]) -> Any:
    """(target, module, parameter name) of every holder of the weights."""
    for target in targets:
        for module, part in target.owners:
            yield target, module, part
