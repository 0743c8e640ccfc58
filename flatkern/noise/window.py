"""The window: the time in which a model sees its weights through noise."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern import _backend
from flatkern.noise import shards
from flatkern.noise.fisher import Fisher
from flatkern.noise.keys import NoiseKey
from flatkern.noise.modes import all_writable, best_mode, check_mode
from flatkern.noise.schedules import Schedule, constant, factor_at
from flatkern.noise.scopes import SCOPES, collect
from flatkern.noise.strategies import STRATEGIES
from flatkern.noise.targets import allocate, fits, hide, scale, show, summarise
from flatkern.ops import _check

_OP = "WeightNoise"
MODES = ("virtual", "inplace", "auto")
RESTORES = ("residual", "snapshot", "host")
RANKS = ("same", "independent")
_DRAWS = 2**16
# What each scope needs, and where it comes from.
_ADAPTED = (
    "LoRALinear layers",
    "; see flatkern.nn.replace_linear and flatkern.integrations.peft.attach",
)
_NEEDED = {"merged": _ADAPTED, "lora": _ADAPTED, "trainable": ("trainable parameters", "")}


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

    def __init__(
        self,
        model: nn.Module,
        sigma: float = 0.05,
        *,
        strategy: str = "flat_lora",
        scope: str = "merged",
        mode: str = "virtual",
        restore: str | None = None,
        schedule: Schedule | None = None,
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
                every vector and embedding.
            mode: "virtual", "inplace" or "auto"; what is not a base weight of LoRALinear layers is
                always written in place.
            restore: how an in-place window keeps the clean bits. "residual": what the noise takes
                from each element, 0.15 to 0.3 bits of bfloat16; a module whose weight is noisy
                cannot be cast or moved, and a weight that was written cannot be restored.
                "snapshot": a copy of every weight in scope. "host": the same in host memory.
                None: a residual where the backend has kernels for it, else a snapshot.
            schedule: factor of sigma as a function of the 0-based step; None: constant.
            seed: in [0, 2^32).
            ranks: "same" noise on every rank of torch.distributed, or "independent", which sharded
                weights refuse.
            fisher: the F of strategy "fisher"; whoever passes it keeps it up to date.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value, or a model with nothing
                to perturb.
        """
        _check.kinds(_OP, nn.Module, model=model)
        _check.kinds(_OP, (float, int), sigma=sigma)
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"{_OP}: schedule must be a function of the 0-based step, such as "
                f"flatkern.cosine_ramp(total_steps), or None, got {schedule!r}"
            )
        _check.finite(_OP, "sigma", sigma, minimum=0.0)
        _check.one_of(_OP, tuple(STRATEGIES), strategy=strategy)
        _check.one_of(_OP, SCOPES, scope=scope)
        _check.one_of(_OP, MODES, mode=mode)
        if restore is not None:
            _check.one_of(_OP, RESTORES, restore=restore)
        _check.one_of(_OP, RANKS, ranks=ranks)
        NoiseKey(seed)
        _check.kinds(_OP, Fisher, optional=True, fisher=fisher)
        if (strategy == "fisher") != (fisher is not None):
            accepted = "given with strategy 'fisher' and with no other"
            _check.refuse(_OP, "fisher", accepted, fisher)
        self._targets = collect(model, scope, strategy)
        if not self._targets:
            what, hint = _NEEDED.get(scope, ("parameters", ""))
            raise ValueError(f"{_OP}: model must have {what}, got nothing to perturb{hint}")
        for target in self._targets:
            target.restore = restore
            target.fisher = fisher
        self._model = model
        self._sigma = sigma
        self._mode = mode
        self._schedule = schedule or constant()
        self._seed = seed
        self._ranks = ranks
        self._check_shards()
        check_mode(_OP, mode, self._targets)
        self._next_step = 0
        self._tables: list[Tensor] = []
        self._open: _Open | None = None

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
        key = NoiseKey(self._seed, step, self._draw_word(draw))
        sigma_t = self._sigma_at(step)
        mode = self._mode_for(micro_batches)
        shards.reshard(self._model)
        self._check_shards()
        for target in self._targets:
            for layer in target.layers:
                layer.require_closed(f"open on {target.name}")
                if layer.merged:
                    raise RuntimeError(f"{_OP}: {target.name} is merged; call unmerge() first")
        self._open = _Open(step, sigma_t, advances, mode)
        try:
            self._fill(key, sigma_t)
            for target in self._targets:
                target.enter(_backend.resolve(target.weight.device.type, target.dtype))
            show(self._targets, self._open.mode)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Close the window, if one is open: exact weights, and the step counter advanced.

        Interrupted, it finishes first. If a weight cannot be restored the error is raised, the
        others are restored, and the window stays open: call it again.
        """
        window = self._open
        if window is None:
            return
        try:
            self._end()
        finally:
            self._end()
        if window.advances:
            self._next_step = window.step + 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Clean weights inside the open window; afterwards the same noise again, bit for bit.

        The window stays open (`active`). Nests; does nothing if no window is open. In place, a
        graph built before the pause can no longer be run backward after it.
        """
        window = self._open
        if window is None or window.paused:
            yield
            return
        window.paused = True
        try:
            shards.reshard(self._model)
            hide(self._targets)
            yield
        finally:
            if self._open is window:
                self._resume(window)

    def _resume(self, window: _Open) -> None:
        try:
            shards.reshard(self._model)
            show(self._targets, self._open.mode)
            window.paused = False
        except BaseException:
            self._end()
            raise

    @property
    def names(self) -> list[str]:
        """The names of the weights in scope."""
        return [target.name for target in self._targets]

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
        return summarise(self._targets, self._mode)

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs, beside the constructor's arguments: the seed and the step.

        Raises:
            RuntimeError: a window is open.
        """
        self._require_closed("state_dict")
        return {"seed": self._seed, "step": self._next_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from `state_dict()`; nothing is changed on an error.

        Raises:
            RuntimeError: a window is open.
            TypeError, ValueError: not what `state_dict` gives.
        """
        self._require_closed("load_state_dict")
        _check.kinds(_OP, dict, state_dict=state_dict)
        if state_dict.keys() != {"seed", "step"}:
            raise ValueError(
                f"{_OP}: state_dict must have the keys seed and step, got {sorted(state_dict)}"
            )
        NoiseKey(**state_dict)
        self._seed, self._next_step = state_dict["seed"], state_dict["step"]

    def _require_closed(self, action: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{_OP}: {action} while a window is open; close it first")

    def _mode_for(self, micro_batches: int) -> str:
        _check.kinds(_OP, int, micro_batches=micro_batches)
        if micro_batches < 1:
            _check.refuse(_OP, "micro_batches", "at least 1", micro_batches)
        if self._mode != "auto":
            return self._mode
        return best_mode(micro_batches, all_writable(self._targets))

    def _check_shards(self) -> None:
        """Refuse, before anything is sent or written, what would not be the unsharded noise."""
        for target in self._targets:
            weight = target.weight
            if not shards.is_sharded(weight):
                continue
            shards.check(_OP, target.name, weight)
            if self._ranks == "independent":
                accepted = f"'same' where weights are sharded, as {target.name} is"
                _check.refuse(_OP, "ranks", accepted, self._ranks)
            if target.fisher is not None:
                accepted = f"one that needs no Fisher where weights are sharded, as {target.name}"
                _check.refuse(_OP, "strategy", accepted, "fisher")
            for layer in target.layers:
                if not layer.takes_shards:
                    kind = type(layer).__name__.removeprefix("FSDP")
                    raise TypeError(
                        f"{_OP}: {target.name} must be of a LoRALinear, or of a PEFT layer over "
                        f"nn.Linear, where it is sharded, got {kind}"
                    )

    def _draw_word(self, draw: int) -> int:
        _check.kinds(_OP, int, draw=draw)
        if not 0 <= draw < _DRAWS:
            _check.refuse(_OP, "draw", f"in [0, {_DRAWS})", draw)
        independent = self._ranks == "independent" and torch.distributed.is_available()
        if independent and torch.distributed.is_initialized():
            return torch.distributed.get_rank() * _DRAWS + draw
        return draw

    def _sigma_at(self, step: int) -> float:
        sigma_t = factor_at(_OP, self._schedule, step) * self._sigma
        if not math.isfinite(sigma_t):
            _check.refuse(_OP, f"schedule({step})", "finite times sigma", sigma_t)
        return sigma_t

    def _fill(self, key: NoiseKey, sigma_t: float) -> None:
        """Write keys and row scales: data at fixed addresses, so that nothing recompiles."""
        if not all(map(fits, self._targets)):
            self._tables = allocate(self._targets)
        for table in self._tables:
            for column, word in enumerate((key.seed, key.step, key.draw)):
                table[:, column] = word
        scale(self._targets, sigma_t, max(sigma_t, self._sigma))

    def _end(self) -> None:
        """End the window; where it is interrupted, calling it again continues."""
        if self._open is None:
            return
        shards.reshard(self._model)
        # In a few calls; where one is refused, weight by weight, so that the others are restored.
        with contextlib.suppress(Exception):
            hide(self._targets)
        failure = None
        # Backwards, so that weights which overlap in memory come out right as well.
        for target in reversed(self._targets):
            try:
                target.leave()
            except Exception as error:  # the other weights must be restored all the same
                failure = error
        if failure is not None:
            raise failure
        self._open = None

    def __getstate__(self) -> dict[str, Any]:
        """Refused while a window is open: a copy could not close it."""
        self._require_closed("copying or pickling")
        return self.__dict__
