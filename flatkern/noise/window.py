"""The window: the time in which a model sees its weights through noise."""

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._interrupts import twice
from flatkern._version import NOISE_VERSION
from flatkern.noise import registry
from flatkern.noise.fisher import Fisher
from flatkern.noise.keys import NoiseKey, check_version, check_words, draw_word
from flatkern.noise.modes import mode_for
from flatkern.noise.options import check_options
from flatkern.noise.schedules import Schedule, factor_at, schedule_of
from flatkern.noise.scopes import warn_of
from flatkern.noise.state import State
from flatkern.noise.summary import summarise
from flatkern.noise.targets import Target
from flatkern.noise.weights import Weights
from flatkern.ops import _check
from flatkern.ops._keywords import known_keywords

_OP = "WeightNoise"


@dataclass
class _Open:
    """The window that is open."""

    step: int
    sigma_t: float
    advances: bool
    mode: str
    paused: bool = False


class WeightNoise:
    """Seeded noise on a model's weights, seen inside windows and nowhere else.

        noise = flatkern.WeightNoise(model, sigma=0.05)
        with noise.window():
            loss_fn(model).backward()
        optimizer.step()

    Inside a window every weight in scope is W_noisy = round(float32(W) + c_i z_ij). z depends on
    (seed, step, draw, tensor number, i, j) alone: no random generator, clock or environment
    variable is read. Both modes give the same bits:

    - virtual: the layers regenerate the noise in forward and backward; W is never written.
    - inplace: W is written at open; its exact bits come back at close, from what `restore` names
      (memory: see `summary`, after the first window). Everything that shares the tensor, such as a
      tied embedding, sees the noise too.

    "auto" takes the cheaper one for each window's `micro_batches` (docs/modes.md): in place from
    three on, where residuals have kernels and nobody else holds the weights.

    A window covers forward and backward: a backward after its close raises a RuntimeError (not
    where activation checkpointing recomputes the layers of an in-place window: then nothing of
    the window was saved). Every exit from `window()` leaves the exact weights, whatever the
    exception. `state_dict()` of the model is clean inside windows too.
    """

    @known_keywords("WeightNoise")
    def __init__(
        self,
        model: nn.Module,
        sigma: float = 0.05,
        *,
        strategy: str = "flat_lora",
        scope: str = "merged",
        mode: str = "virtual",
        restore: str | None = None,
        schedule: Schedule | str | None = None,
        seed: int = 0,
        ranks: str = "same",
        fisher: Fisher | None = None,
    ) -> None:
        """Find the weights in scope; nothing is allocated or changed before the first window.

        Args:
            model: what is added to it later takes no noise.
            sigma: strength, finite and at least 0; its unit is the strategy's.
            strategy: c_i, or c_i |W_ij|, from W as `scope` says: "gaussian" (sigma), "matrix"
                (sigma ||W||), "element" (sigma |W_ij|), "row" (sigma ||W_i||), "flat_lora"
                (sigma / sqrt(n) ||W_i||) or "fisher" (sigma ||W_i|| / sqrt(1 + eta F_i)). In a
                vector each element is a row, but "row" and "fisher" take the vector's norm.
            scope: "merged": the base weights of LoRALinear layers, scaled as W' = W + s B A.
                "origin": every tensor but the adapters; "lora": the adapters; "full": both;
                "trainable": every trainable parameter. "all": as "merged", and with sigma |w|
                every other floating base parameter. PEFT's adapters count, attached or not.
            mode: "virtual", "inplace" or "auto"; what is not a base weight of LoRALinear layers is
                always written in place.
            restore: how an in-place window keeps the clean bits. "residual": what the noise takes
                from each element, 0.15 to 0.3 bits of bfloat16; a module whose weight is noisy
                cannot be cast or moved, and a weight that was written cannot be restored.
                "snapshot": a copy of every weight in scope. "host": the same in host memory.
                None: a residual where the backend has kernels for it, else a snapshot.
            schedule: factor of sigma as a function of the 0-based step; None or "constant": 1.
            seed: in [0, 2^32).
            ranks: "same" noise on every rank of torch.distributed, or "independent", which sharded
                weights refuse.
            fisher: the F of strategy "fisher"; whoever passes it keeps it up to date.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value, a model with nothing to
                perturb, or a tensor that stands for a weight held elsewhere (FSDP version 1,
                ZeRO-3, offloaded, lazy).

        Warns:
            UserWarning: weights in scope that take no noise (complex, quantised), by name.
        """
        _check.kinds(_OP, nn.Module, model=model)
        options = {"scope": scope, "strategy": strategy, "mode": mode, "restore": restore}
        options |= {"ranks": ranks, "fisher": fisher}
        check_options(_OP, sigma=sigma, seed=seed, **options)
        self._open: _Open | None = None
        self._sigma = sigma
        self._strategy = strategy
        self._scope = scope
        self._mode = mode
        self._schedule = schedule_of(_OP, schedule)
        self._seed = seed
        self._ranks = ranks
        self._next_step = 0
        self._weights = Weights(model, **options)
        warn_of(_OP, self._weights.skipped, stacklevel=2)

    @contextlib.contextmanager
    def window(
        self, step: int | None = None, draw: int = 0, micro_batches: int = 1
    ) -> Iterator[None]:
        """`open`, then `close` on any exit; only an exit without exception advances the step."""
        # Before the try: an error here must not close the window that is open.
        self._require_closed("open")
        # Twice, so that Ctrl-C at any point, this block's own lines included, still restores.
        try:
            try:
                self.open(step, draw, micro_batches)
                yield
                self.close()
            finally:
                self._end()
        finally:
            self._end()

    def open(self, step: int | None = None, draw: int = 0, micro_batches: int = 1) -> None:
        """Open a window; on any error nothing is open and the weights are exactly clean.

        Args:
            step: 0-based optimizer step in [0, 2^32); None takes the internal counter, which
                `close` then advances.
            draw: in [0, 2^16), for several draws in one step.
            micro_batches: how many forward and backward passes will share the window, at least 1;
                mode "auto" goes by it, nothing else does.

        Raises:
            TypeError, ValueError: `step`, `draw`, `micro_batches` or what the schedule returned is
                out of range; a weight that the ops refuse.
            RuntimeError: a window is open on these layers, or one of them is merged.
        """
        self._require_closed("open")
        advances = step is None
        step = self._next_step if step is None else step
        check_words(_OP, step=step)
        key = NoiseKey(self._seed, step, draw_word(_OP, draw, self._ranks))
        sigma_t = self._sigma_at(step)
        mode = mode_for(_OP, self._mode, micro_batches, self._targets)
        registry.require_free(_OP, self._targets, self)
        self._weights.check()
        try:
            self._open = _Open(step, sigma_t, advances, mode)
            registry.register(self)
            self._weights.enter(key, sigma_t, self._sigma)
            self._weights.show(mode)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Close the window, if one is open: exact weights, and the step counter advanced.

        Interrupted, it finishes first. If a weight cannot be restored the error is raised, the
        others are restored, and the window stays open: call it again, or `discard`.

        Warns:
            UserWarning: layers in scope that were not called, once for each (see `silent`).

        Raises:
            RuntimeError: something else wrote weights inside an in-place window, by name.
        """
        window = self._open
        if window is None:
            return
        twice(self._end)
        if window.advances:
            self._next_step = window.step + 1
        if window.sigma_t > 0:
            self._weights.calls.end(_OP, self._states)

    def discard(self) -> list[str]:
        """End the window although something else wrote weights inside it, and keep what stands.

        The way out of a `close` that raises. The weights that something else wrote keep what is in
        them, noise included; every other weight is exactly clean. The step counter stays where it
        is, as after an exception. Nothing happens if no window is open.

        Returns:
            The names of the weights that were kept as they stand.
        """
        if self._open is None:
            return []
        with contextlib.suppress(Exception):
            self._end()
        names = self._weights.abandon()
        self._end()
        return names

    def abandon(self) -> None:
        """`close` without a step: what `flatkern.close` and the end of this object do."""
        twice(self._end)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Clean weights inside the open window; afterwards the same noise again, bit for bit.

        The window stays open (`active`). Nests; does nothing if no window is open. In place, a
        graph built before the pause can no longer be run backward after it. Layers may be merged
        here; one that still is at the end raises a RuntimeError, which closes the window.
        """
        window = self._open
        if window is None or window.paused:
            yield
            return
        window.paused = True
        try:
            self._weights.hide()
            yield
        finally:
            if self._open is window:
                self._resume(window)

    def _resume(self, window: _Open) -> None:
        try:
            self._weights.resume(window.mode)
            window.paused = False
        except BaseException:
            self._end()
            raise

    @property
    def names(self) -> list[str]:
        """The names of the weights in scope, those of the unwrapped model."""
        return self._weights.names

    @property
    def silent(self) -> list[str]:
        """The names of the weights that no virtual window's noise has reached so far.

        Their layers were not called: code reads the weights, or does not use them. Found at a
        close. A layer that has been called, in any window, is not among them.
        """
        return list(self._weights.calls.silent)

    @property
    def active(self) -> bool:
        """Whether a window is open, paused or not."""
        return self._open is not None

    @property
    def step(self) -> int:
        """The step of the open window; with none open, of the next."""
        return self._next_step if self._open is None else self._open.step

    @property
    def sigma_t(self) -> float:
        """sigma times the schedule's factor, of the open window; with none open, of the next."""
        return self._sigma_at(self._next_step) if self._open is None else self._open.sigma_t

    def summary(self) -> str:
        """One line per weight (name, dtype, shape, tensor number, mode), then totals and bytes."""
        return summarise(self._states, self._mode, self.silent, self._weights.skipped)

    def __repr__(self) -> str:
        """The arguments that say what noise this is, and where it stands."""
        state = "open" if self.active else "closed"
        return (
            f"{_OP}(sigma={self._sigma}, strategy={self._strategy!r}, scope={self._scope!r}, "
            f"mode={self._mode!r}, seed={self._seed}; {len(self.names)} weights, step {self.step}, "
            f"{state})"
        )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs, beside the constructor's arguments: the seed and the step.

        And the version of the noise: another one, whose bits differ, is refused.

        Raises:
            RuntimeError: a window is open.
        """
        self._require_closed("state_dict")
        return {"seed": self._seed, "step": self._next_step, "noise_version": NOISE_VERSION}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from `state_dict()`; nothing is changed on an error.

        Raises:
            RuntimeError: a window is open.
            TypeError, ValueError: not what `state_dict` gives.
        """
        self._require_closed("load_state_dict")
        _check.kinds(_OP, dict, state_dict=state_dict)
        state_dict = check_version(_OP, state_dict)
        if state_dict.keys() != {"seed", "step"}:
            raise ValueError(
                f"{_OP}: state_dict must have the keys seed and step, got {sorted(state_dict)}"
            )
        check_words(_OP, **state_dict)
        self._seed, self._next_step = state_dict["seed"], state_dict["step"]

    def _require_closed(self, action: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{_OP}: {action} while a window is open; close it first")

    def _sigma_at(self, step: int) -> float:
        sigma_t = factor_at(_OP, self._schedule, step) * self._sigma
        if not math.isfinite(sigma_t):
            _check.refuse(_OP, f"schedule({step})", "finite times sigma", sigma_t)
        return sigma_t

    @property
    def _targets(self) -> list[Target]:
        return self._weights.targets

    @property
    def _states(self) -> list[State]:
        return self._weights.states

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What every optimizer tells the windows that are open when it has stepped."""
        window = self._open
        if window is not None and window.sigma_t > 0 and not window.paused:
            self._weights.calls.note_step(_OP, optimizer)

    def row_squares(self, name: str, gradient: Tensor) -> Tensor:
        """The sum of squares of a gradient over each row of weight `name`, as its scale has rows.

        Args:
            name: one of `names`.
            gradient: of the weight's shape.

        Returns:
            float32 or wider, one for each row.
        """
        return next(t for t in self._targets if t.name == name).rows.squares(gradient)

    def _end(self) -> None:
        """End the window; where it is interrupted, calling it again continues."""
        if self._open is None:
            return
        self._weights.leave()
        # In this order: an interruption in between leaves what calling it again finishes.
        registry.unregister(self)
        self._open = None

    def __del__(self) -> None:
        """A window whose owner is gone is closed: nobody else could."""
        if getattr(self, "_open", None) is None or sys.is_finalizing():
            return
        warnings.warn(f"{self!r} was dropped with its window open", ResourceWarning, stacklevel=2)
        self.discard()

    def __getstate__(self) -> dict[str, Any]:
        """Refused while a window is open: a copy could not close it."""
        self._require_closed("copying or pickling")
        return self.__dict__
