"""Faults that strike a running step at a point of one's choice: a line, an op, a moment."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flatkern

PACKAGE = str(Path(flatkern.__file__).parent)
NEVER = 2**62


class Injector:
    """A context in which the `at`th point raises `error`, once.

    Attributes:
        passed: how many points were passed.
        struck: whether the error was raised.
    """

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        self.at, self.error = at, error
        self.passed, self.struck = 0, False

    def point(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            self.struck = True
            raise self.error()


class Lines(Injector):
    """Before a line of flatkern's own files: where Ctrl-C and MemoryError come."""

    # What the path of those files starts with.
    within = PACKAGE

    def __enter__(self) -> "Lines":
        self._previous = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        if event == "line":
            self.point()
        return self._trace


class Ops(Injector):
    """Before or behind an op of torch or flatkern: kernel launches, allocations, copies.

    Of everything that runs: forward, backward (in C++ nodes too), windows and the optimizer.
    """

    def __init__(self, at: int, error: Callable[[], BaseException], behind: bool) -> None:
        super().__init__(at, error)
        injector = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if not behind:
                    injector.point()
                result = func(*args, **(kwargs or {}))
                if behind:
                    injector.point()
                return result

        self._mode = Mode()

    def __enter__(self) -> "Ops":
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)


class Timer(Injector):
    """A real signal after `at` microseconds, wherever that is; its handler raises the error."""

    def __enter__(self) -> "Timer":
        self._previous = signal.signal(signal.SIGALRM, self._strike)
        signal.setitimer(signal.ITIMER_REAL, self.at * 1e-6 if self.at < NEVER else 0)
        return self

    def _strike(self, *_: Any) -> None:
        self.struck = True
        raise self.error()

    def __exit__(self, *_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)


def out_of_memory() -> BaseException:
    """As a GPU's allocator raises it."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(143),
    "MemoryError": MemoryError,
    "OutOfMemoryError": out_of_memory,
    "RuntimeError": lambda: RuntimeError("CUDA error: unspecified launch failure (simulated)"),
}
