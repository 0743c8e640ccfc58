"""Schedules: callables that take the 0-based optimizer step and return a factor of sigma or rho."""

import functools
import math
from collections.abc import Callable

from flatkern.ops import _check

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """The factor 1 at every step."""
    return _one


def cosine_ramp(total_steps: int) -> Schedule:
    """(1 - cos(pi t / T)) / 2, from 0 at step t = 0 to 1 at t = T, and 1 after that.

    The first window of a ramp is noiseless. Source: Flat-LoRA (Li et al., 2024).

    Args:
        total_steps: T in optimizer steps, at least 1.

    Raises:
        TypeError, ValueError: `total_steps` is not an int, or below 1.
    """
    _check_total("cosine_ramp", total_steps)
    return functools.partial(_cosine_ramp, total_steps)


def linear_ramp(total_steps: int) -> Schedule:
    """t / T, from 0 at step t = 0 to 1 at t = T, and 1 after that.

    Args, raises: as `cosine_ramp`.
    """
    _check_total("linear_ramp", total_steps)
    return functools.partial(_linear_ramp, total_steps)


def linear_decay(total_steps: int) -> Schedule:
    """1 - t / T, from 1 at step t = 0 to 0 at t = T, and 0 after that.

    Args, raises: as `cosine_ramp`.
    """
    _check_total("linear_decay", total_steps)
    return functools.partial(_linear_decay, total_steps)


def inverse_sqrt() -> Schedule:
    """1 / sqrt(t + 1), 1 at step t = 0: the radius of SAM's convergence theorems."""
    return _inverse_sqrt


def lpf(total_steps: int, alpha: float = 15.0) -> Schedule:
    """1 + alpha (1 - cos(pi t / T)) / 2, from 1 to 1 + alpha. Source: LPF-SGD (Bisla et al., 2022).

    Args:
        total_steps: T in optimizer steps, at least 1.
        alpha: finite and at least 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """
    _check_total("lpf", total_steps)
    _check.kinds("lpf", (float, int), alpha=alpha)
    _check.finite("lpf", "alpha", alpha, minimum=0.0)
    return functools.partial(_lpf, total_steps, alpha)


def _check_total(op: str, total_steps: int) -> None:
    _check.kinds(op, int, total_steps=total_steps)
    if total_steps < 1:
        _check.refuse(op, "total_steps", "at least 1", total_steps)


def _one(step: int) -> float:
    return 1.0


def _cosine_ramp(total_steps: int, step: int) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * min(step / total_steps, 1.0)))


def _linear_ramp(total_steps: int, step: int) -> float:
    return min(step / total_steps, 1.0)


def _linear_decay(total_steps: int, step: int) -> float:
    return max(1.0 - step / total_steps, 0.0)


def _inverse_sqrt(step: int) -> float:
    return 1.0 / math.sqrt(step + 1)


def _lpf(total_steps: int, alpha: float, step: int) -> float:
    return 1.0 + alpha * _cosine_ramp(total_steps, step)


def schedule_of(op: str, schedule: Schedule | str | None) -> Schedule:
    """What `WeightNoise(schedule=...)` means: None and "constant" are `constant()`.

    Raises:
        TypeError: neither that nor a function. The other schedules have no name where nobody knows
            how many steps a run will take.
    """
    if schedule is None or (isinstance(schedule, str) and schedule == "constant"):
        return constant()
    if callable(schedule):
        return schedule
    if schedule in ("cosine_ramp", "linear_ramp", "linear_decay", "lpf"):
        raise TypeError(
            f"{op}: schedule {schedule!r} needs the number of optimizer steps, which only the "
            f"callbacks of a trainer know; pass flatkern.{schedule}(total_steps)"
        )
    raise TypeError(
        f"{op}: schedule must be 'constant', a function of the 0-based step, such as "
        f"flatkern.cosine_ramp(total_steps), or None, got {schedule!r}"
    )


def factor_at(op: str, schedule: Schedule, step: int) -> float:
    """What the schedule gives at a step; ValueError unless it is finite and at least 0."""
    factor = float(schedule(step))
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{op}: schedule({step}) must be finite and at least 0, got {factor}")
    return factor
