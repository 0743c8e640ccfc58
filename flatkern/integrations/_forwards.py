"""Which forwards of a training run see the noise: those that are trained through."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from flatkern._interrupts import twice
from flatkern.noise import WeightNoise

# Forwards of activation checkpointing that keep no graph (torch's reentrant one, DeepSpeed's,
# Unsloth's): autograd functions, whose first argument is `ctx`.
_CHECKPOINT = re.compile(r"Checkpoint\w*\.forward$")
# Seen before a forward that is trained through: the module, its arguments and keywords.
Look = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class TrainingForwards:
    """Hooks that pause the noise for forwards without gradients and of models in eval mode.

    What counts is how a forward enters the model: the reference of preference training, a rollout
    or old log-probabilities come in without gradients, and are clean in all layers. Activation
    checkpointing turns gradients off further inside, and runs its layers again in backward: noisy
    both times.
    """

    def __init__(
        self,
        noise: Callable[[], WeightNoise | None],
        *,
        without_grad: bool = False,
        in_eval: bool = False,
        look: Look | None = None,
    ) -> None:
        """Nothing is hooked before `add`.

        Args:
            noise: gives the noise of the training that is under way.
            without_grad: whether forwards without gradients see it.
            in_eval: whether those of a model in eval mode do.
            look: called before a forward that is trained through, outside compiled regions.
        """
        self._noise = noise
        self._without_grad, self._in_eval, self._look = without_grad, in_eval, look
        self._undo: list[Callable[[], None]] = []
        self._models: list[nn.Module] = []
        self._off = False
        # By thread, because DataParallel runs its replicas in several.
        self._entered = threading.local()

    def add(self, model: nn.Module) -> None:
        """Hook the model and its parts, down to lists of blocks, as which nobody calls it."""
        self._models.append(model)
        for module in _entrances(model):
            before, after = module.register_forward_pre_hook, module.register_forward_hook
            # On one line, so that no interrupt comes between a hook and its undoing.
            self._undo.append(before(self._before, prepend=True, with_kwargs=True).remove)
            self._undo.append(after(self._after, always_call=True).remove)
            if module.__dict__.get("_compiled_call_impl") is not None:
                self._stand_before(module)

    @property
    def active(self) -> bool:
        """Whether anything is hooked."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take every hook off again."""
        twice(self._take_off)

    def _take_off(self) -> None:
        self.leave()
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._models.clear()

    def leave(self) -> None:
        """Forget the forwards that an interrupt ended."""
        while stack := self._stack():
            stack.pop().close()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Every forward sees what the window shows."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _stack(self) -> list[contextlib.ExitStack]:
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        return self._entered.stack

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled region is entered through hooks outside it.
        if torch.compiler.is_compiling():
            return
        pause, stack = contextlib.ExitStack(), self._stack()
        outermost = not stack
        stack.append(pause)
        noise = None if self._off else self._noise()
        if noise is None or not noise.active:
            return
        if outermost and not module.training and not self._in_eval:
            pause.enter_context(noise.paused())
        elif not torch.is_grad_enabled():
            if not self._without_grad and not _in_checkpoint():
                pause.enter_context(_same_versions(self._models))
                pause.enter_context(noise.paused())
        elif outermost and self._look is not None:
            self._look(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and (stack := self._stack()):
            stack.pop().close()

    def _stand_before(self, module: nn.Module) -> None:
        """The same around a module that `Module.compile` has compiled with its hooks."""
        compiled = module._compiled_call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(module, args, kwargs)
            try:
                return compiled(*args, **kwargs)
            finally:
                self._after(module, args, None)

        self._undo.append(lambda: setattr(module, "_compiled_call_impl", compiled))
        module._compiled_call_impl = call

    def __reduce__(self) -> Any:
        """A copy of the model has no part in the training."""
        return TrainingForwards, (_no_noise,)


def _no_noise() -> None:
    """What a copy of the hooks asks."""


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The model, and parts of it that somebody may call by themselves: a backbone, a tower."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module, inside: bool) -> None:
        if module in found or next(module.parameters(), None) is None:
            return
        found[module] = None
        # Blocks are called by what holds their list, further inside than the model's own lists.
        if inside and isinstance(module, nn.ModuleList | nn.Sequential):
            return
        for child in module.children():
            visit(child, inside or module is not model)

    visit(model, inside=False)
    return list(found)


def _in_checkpoint() -> bool:
    """Whether this runs in a forward that activation checkpointing will run again."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _CHECKPOINT.search(code.co_qualname) and code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _same_versions(models: list[nn.Module]) -> Iterator[None]:
    """What is written meanwhile gets its bits back: graphs that exist already remain valid.

    A pause of a window in place would otherwise invalidate the policy's graph for a reference that
    is computed after it. No graph is made in the meantime: gradients are off.
    """
    found = dict.fromkeys(p for model in models for p in model.parameters())
    tensors = [p for p in found if not p.is_inference()]
    before = [p._version for p in tensors]
    try:
        yield
    finally:
        changed = [(p, v) for p, v in zip(tensors, before, strict=True) if p._version != v]
        if changed:
            torch._C._autograd._unsafe_set_version_counter(*zip(*changed, strict=True))
