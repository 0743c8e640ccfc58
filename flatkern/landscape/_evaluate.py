"""The loss at points around a model's weights, which are seen through modules and not written.

While a module's forward runs, its parameter is another one, W + e, made for that forward and freed
after it: at no time is more than one layer's noisy weight in memory. Weights that code reads
without calling their module (`F.linear(x, other.weight)`) are written in place, and their clean
bits are kept. A trial run finds out which are which.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flatkern.landscape._weights import Shift, Weight
from flatkern.nn import shards
from flatkern.nn.calibration import evaluating
from flatkern.ops import _check

LossFn = Callable[[], Tensor | float]
# What gives a weight's values as no tensor; and what asks for no values at all.
_VALUES = ("item", "tolist", "numpy", "__array__", "__float__", "__bool__", "__int__")
_NO_VALUES = ("type_as", "requires_grad_", "register_hook", "detach_", "share_memory_")


@contextlib.contextmanager
def as_found(op: str, model: nn.Module, loss_fn: LossFn) -> Iterator[Callable[[], Any]]:
    """Eval mode; yields what calls `loss_fn`, each time with the same random numbers.

    Modes of modules and the generators of torch, Python and numpy are afterwards as they were.
    """
    if not callable(loss_fn):
        raise TypeError(f"{op}: loss_fn must be callable, got {type(loss_fn).__name__}")
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = _random_states(devices)

    def call() -> Any:
        _set_random_states(states)
        return loss_fn()

    try:
        with evaluating(model):
            yield call
    finally:
        _set_random_states(states)


def _random_states(devices: set[torch.device]) -> list[tuple[Callable[[Any], Any], Any]]:
    """Pairs of what sets a generator's state and the state."""
    states: list = [(torch.set_rng_state, torch.get_rng_state())]
    for device in devices:
        state = torch.cuda.get_rng_state(device)
        states.append((lambda s, device=device: torch.cuda.set_rng_state(s, device), state))
    states.append((random.setstate, random.getstate()))
    if (numpy := sys.modules.get("numpy")) is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


def _set_random_states(states: list[tuple[Callable[[Any], Any], Any]]) -> None:
    for put, state in states:
        put(state)


def number(op: str, value: Any) -> float:
    """A loss as a float; it may be NaN."""
    if isinstance(value, Tensor):
        value = shards.whole(value)
        if value.numel() == 1 and not value.is_complex():
            return float(value.detach())
    elif isinstance(value, float | int):
        return float(value)
    got = _check.describe(value)
    raise TypeError(f"{op}: loss_fn must return a scalar tensor or a number, got {got[:200]}")


class Evaluation:
    """`loss_fn` at points around the weights, inside `with`; clean weights on any exit.

    Attributes:
        plain: the loss at the weights themselves, to the bit what `loss_fn` gives in eval mode.
        in_place: the names of the weights that are written, because code reads them.
    """

    def __init__(self, op: str, model: nn.Module, loss_fn: LossFn, weights: list[Weight]) -> None:
        """Nothing is done yet."""
        self._op, self._model, self._loss_fn = op, model, loss_fn
        self._weights = weights
        self._shifts: Sequence[Shift | None] = []
        self._stack = contextlib.ExitStack()
        # By (module, parameter name): the clean parameter, and how deep the module's calls are.
        self._shown: dict[tuple[nn.Module, str], list] = {}
        self._kept: dict[int, Tensor] = {}

    def __enter__(self) -> "Evaluation":
        """Find the plain loss, and how each weight is used."""
        with contextlib.ExitStack() as stack:
            self._call = stack.enter_context(as_found(self._op, self._model, self._loss_fn))
            self.plain = self._evaluate()
            self._written = self._find_read()
            self.in_place = [self._weights[i].name for i in sorted(self._written)]
            stack.callback(self._put_back)
            for i, weight in enumerate(self._weights):
                if i not in self._written:
                    for module, name in weight.places:
                        self._hook(stack, i, module, name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Everything as it was."""
        self._stack.close()

    def loss(self, shifts: Sequence[Shift | None]) -> float:
        """The loss at W + e, for a shift (or None) of each weight."""
        self._shifts = shifts
        try:
            with torch.no_grad():
                if self._written:
                    # What FSDP has gathered does not see what is written to its shards.
                    shards.reshard(self._model)
                for i in self._written:
                    self._write(i, shifts[i])
            return self._evaluate()
        finally:
            self._shifts = []
            self._hide()

    def _evaluate(self) -> float:
        with torch.no_grad():
            return number(self._op, self._call())

    def _write(self, i: int, shift: Shift | None) -> None:
        weight = self._weights[i]
        if weight.quantized is not None:
            raise RuntimeError(
                f"{self._op}: {weight.name} is quantised and its layer was not called by loss_fn, "
                "so nothing can show it through noise"
            )
        held = weight.held
        if i not in self._kept:
            self._kept[i] = held.detach().clone()
        clean = self._kept[i]
        held.copy_(clean if shift is None else weight.shifted(clean, shift))

    @torch.no_grad()
    def _put_back(self) -> None:
        self._hide()
        if self._kept:
            shards.reshard(self._model)
        for i, clean in self._kept.items():
            self._weights[i].held.copy_(clean)
        self._kept.clear()

    def _hide(self) -> None:
        """The clean parameters in every module that an exception kept from returning."""
        for (module, name), (clean, _) in self._shown.items():
            module._parameters[name] = clean
        self._shown.clear()

    def _hook(self, stack: contextlib.ExitStack, i: int, module: nn.Module, name: str) -> None:
        weight = self._weights[i]
        if weight.quantized is not None:
            handle = module.register_forward_hook(self._add_product(i))
            stack.callback(handle.remove)
            return
        place = module, name

        def show(module: nn.Module, args: Any) -> None:
            shift = self._shifts[i] if self._shifts else None
            if place in self._shown:
                self._shown[place][1] += 1
            elif shift is not None:
                clean = module._parameters[name]
                noisy = nn.Parameter(weight.shifted(clean, shift), clean.requires_grad)
                self._shown[place] = [clean, 1]
                module._parameters[name] = noisy

        def hide(module: nn.Module, args: Any, output: Any) -> None:
            if place in self._shown:
                self._shown[place][1] -= 1
                if not self._shown[place][1]:
                    module._parameters[name] = self._shown.pop(place)[0]

        # FSDP gathers before all other hooks, and shards again after them.
        stack.callback(module.register_forward_pre_hook(show).remove)
        stack.callback(module.register_forward_hook(hide, prepend=True).remove)

    def _add_product(self, i: int) -> Callable[..., Tensor | None]:
        weight = self._weights[i]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            shift = self._shifts[i] if self._shifts else None
            if shift is None:
                return None
            noise = weight.noise(shift, args[0].dtype)
            return output + F.linear(args[0], noise).to(output.dtype)

        return add

    def _find_read(self) -> set[int]:
        """The weights that are read outside their modules' forwards, or whose modules are silent.

        A compiled module leaves no trace, and is silent: it may not look at its parameters again.
        """
        watch = _Watch(self._weights)
        with contextlib.ExitStack() as stack:
            for i, weight in enumerate(self._weights):
                for module, _ in weight.places:
                    enter, leave = watch.hooks(i)
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    hook = module.register_forward_hook(leave, always_call=True)
                    stack.callback(hook.remove)
            with watch:
                self._evaluate()
        return watch.read | (set(range(len(self._weights))) - watch.called)


class _Watch(TorchFunctionMode):
    """Notes which parameters are used while no module that holds them runs."""

    def __init__(self, weights: list[Weight]) -> None:
        super().__init__()
        self._of = {id(w.held): i for i, w in enumerate(weights)}
        self._running = [0] * len(weights)
        self.called: set[int] = set()
        self.read: set[int] = set()

    def hooks(self, i: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                self._running[i] += 1
                self.called.add(i)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._running[i] -= 1

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        used = {self._of[id(a)] for a in leaves if isinstance(a, Tensor) and id(a) in self._of}
        outside = {i for i in used if not self._running[i]}
        if outside and _gives_values(func, result):
            self.read |= outside
        return result


def _gives_values(func: Any, result: Any) -> bool:
    """Whether a function of a tensor gives its values, and not its shape, dtype or place."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
        return name not in ("grad", "_grad") and isinstance(result, Tensor)
    if name in _VALUES:
        return True
    if name in _NO_VALUES or name.startswith("new_") or name.endswith("_like"):
        return False
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
