"""What the callbacks for trainers share: the noise of one training run, and what it logs."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._contexts import still_statistics
from flatkern.noise import WeightNoise, constant, cosine_ramp, linear_ramp, lpf
from flatkern.noise.schedules import Schedule
from flatkern.ops import _check

_SCHEDULES = {"cosine_ramp": cosine_ramp, "linear_ramp": linear_ramp, "lpf": lpf}


class NoisyRun:
    """One training run at a time: its `WeightNoise`, and whatever must be undone at its end.

    A trainer's callback calls `_begin`, then for each optimizer step `_open` and `_noise.close`,
    and `finish` on any exit.
    """

    def __init__(
        self,
        sigma: float = 0.05,
        *,
        schedule: str | Schedule = "cosine_ramp",
        measure: bool = True,
        **options: Any,
    ) -> None:
        """Nothing is changed before training begins.

        Args:
            sigma: as in `flatkern.WeightNoise`.
            schedule: "constant", or over the run's optimizer steps: "cosine_ramp", "linear_ramp"
                or "lpf"; or a function of the 0-based step.
            measure: whether `noise_loss_rise` is measured and logged.
            options: the other arguments of `flatkern.WeightNoise`: strategy, scope, mode, restore,
                seed, ranks, fisher. They are checked when training begins.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or value.
        """
        self._op = type(self).__name__
        _check.kinds(self._op, (float, int), sigma=sigma)
        _check.finite(self._op, "sigma", sigma, minimum=0.0)
        if not callable(schedule):
            _check.one_of(self._op, ("constant", *_SCHEDULES), schedule=schedule)
        _check.kinds(self._op, bool, measure=measure)
        self._sigma = sigma
        self._schedule = schedule
        self._measure = measure
        self._options = options
        self._noise: WeightNoise | None = None
        self._cleanup = contextlib.ExitStack()
        self._sigma_t: float | None = None
        self._rise: Tensor | None = None

    @property
    def noise(self) -> WeightNoise | None:
        """The noise of the training that is under way, for `summary()` and `paused()`."""
        return self._noise

    def finish(self) -> None:
        """Close the window and take everything off the model; harmless at any time."""
        if self._noise is not None:
            self._noise.close()
            self._noise = None
        self._cleanup.close()

    def _begin(self, model: nn.Module, max_steps: float) -> None:
        """Find the weights; what an earlier training left behind is taken away first."""
        self.finish()
        self._sigma_t = self._rise = None
        options = self._options | {"schedule": self._over(max_steps)}
        if _has_peft_layers(model):
            from flatkern.integrations.peft import attach, detach

            self._noise = attach(model, self._sigma, **options)
            self._cleanup.callback(detach, model)
        else:
            self._noise = WeightNoise(model, self._sigma, **options)

    def _over(self, max_steps: float) -> Schedule:
        if callable(self._schedule):
            return self._schedule
        make = _SCHEDULES.get(self._schedule)
        if make is None:
            return constant()
        if not 0 < max_steps < math.inf:
            accepted = "'constant' or a function where the number of steps is not known beforehand"
            _check.refuse(self._op, "schedule", accepted, self._schedule)
        return make(int(max_steps))

    def _open(self, step: int, micro_batches: int) -> None:
        """Open the window of an optimizer step."""
        self._noise.open(step=step, micro_batches=micro_batches)
        self._sigma_t = self._noise.sigma_t
        self._rise = None

    def _figures(self) -> dict[str, float]:
        """What the log says of the last window; waits for the device."""
        figures = {"noise_sigma": self._sigma_t, "noise_loss_rise": self._rise}
        return {name: float(value) for name, value in figures.items() if value is not None}


def loss_rise(
    noise: WeightNoise, model: nn.Module, loss: Callable[[], Tensor | None]
) -> Tensor | None:
    """`loss()` under the open window's noise less `loss()` at clean weights; None if that is None.

    Costs two calls without gradients. Both draw the same random numbers, which the next forward
    draws again; the statistics of batch norms stay.
    """
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = {"device_type": next(iter(devices)).type} if devices else {}
    losses = []
    for view in (contextlib.nullcontext, noise.paused):
        with (
            view(),
            torch.no_grad(),
            still_statistics(model),
            torch.random.fork_rng(devices, **kind),
        ):
            value = loss()
        if value is None:
            return None
        losses.append(value.detach().float())
    return losses[0] - losses[1]


def _has_peft_layers(model: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
