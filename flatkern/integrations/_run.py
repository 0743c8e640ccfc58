"""What the callbacks for trainers share: the noise of one training run, and what it logs."""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._interrupts import twice
from flatkern.integrations._forwards import TrainingForwards
from flatkern.methods._contexts import still_statistics
from flatkern.noise import Fisher, WeightNoise, constant, cosine_ramp, linear_ramp, lpf
from flatkern.noise.options import check_options
from flatkern.noise.schedules import Schedule
from flatkern.ops import _check
from flatkern.ops._keywords import known_keywords

_SCHEDULES = {"cosine_ramp": cosine_ramp, "linear_ramp": linear_ramp, "lpf": lpf}

# The run under way on each model, whose callback may be out of reach after an interrupt.
_RUNS: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


class NoisyRun:
    """One training run at a time: its `WeightNoise`, and whatever must be undone at its end.

    A trainer's callback calls `_begin`, then for each optimizer step `_open` and `_noise.close`,
    and `finish` on any exit.
    """

    _measures = True  # unless `measure` says otherwise
    _in_eval = False  # whether a model in eval mode is trained with noise

    @known_keywords("FlatLoRACallback")
    def __init__(
        self,
        sigma: float = 0.05,
        *,
        strategy: str = "flat_lora",
        scope: str = "merged",
        mode: str = "virtual",
        restore: str | None = None,
        schedule: str | Schedule = "cosine_ramp",
        seed: int = 0,
        ranks: str = "same",
        fisher: Fisher | None = None,
        measure: bool | None = None,
        noise_without_grad: bool = False,
    ) -> None:
        """Nothing is changed before training begins.

        Args:
            sigma, strategy, scope, mode, restore, seed, ranks, fisher: as in
                `flatkern.WeightNoise`.
            schedule: "constant", or over the run's optimizer steps: "cosine_ramp", "linear_ramp"
                or "lpf"; or a function of the 0-based step.
            measure: whether `noise_loss_rise` is measured and logged; None: as the class says.
            noise_without_grad: whether forwards without gradients see the noise as well. False:
                references, rollouts and old log-probabilities are those of the clean weights.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or value, or unknown.
        """
        self._op = type(self).__name__
        if not callable(schedule):
            _check.one_of(self._op, ("constant", *_SCHEDULES), schedule=schedule)
        _check.kinds(self._op, bool, optional=True, measure=measure)
        _check.kinds(self._op, bool, noise_without_grad=noise_without_grad)
        options = {
            "strategy": strategy,
            "scope": scope,
            "mode": mode,
            "restore": restore,
            "seed": seed,
            "ranks": ranks,
            "fisher": fisher,
        }
        check_options(self._op, sigma=sigma, **options)
        self._sigma = sigma
        self._schedule = schedule
        self._measure = self._measures if measure is None else measure
        self._options = options
        self._noise: WeightNoise | None = None
        self._model: nn.Module | None = None
        self._attached: nn.Module | None = None
        self._without_grad = noise_without_grad
        self._forwards: TrainingForwards | None = None
        self._sigma_t: float | None = None
        self._rise: Tensor | None = None

    @property
    def noise(self) -> WeightNoise | None:
        """The noise of the training that is under way, for `summary()` and `paused()`."""
        return self._noise

    def finish(self) -> None:
        """Close the window and take everything off the model; harmless at any time."""
        twice(self._take_off)

    def _take_off(self) -> None:
        if self._forwards is not None:
            self._forwards.remove()
            self._forwards = None
        if self._noise is not None:
            self._noise.close()
            self._noise = None
        if self._attached is not None:
            from flatkern.integrations.peft import detach

            detach(self._attached)
            self._attached = None
        self._model = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward that is trained through."""

    def _begin(self, model: nn.Module, max_steps: float) -> None:
        """Find the weights; what an earlier training left behind is taken away first."""
        self.finish()
        earlier = _RUNS.pop(model, lambda: None)()
        if earlier is not None and earlier._model is model:
            earlier.finish()
        self._model, _RUNS[model] = model, weakref.ref(self)
        self._sigma_t = self._rise = None
        options = self._options | {"schedule": self._over(max_steps)}
        if _has_peft_layers(model):
            from flatkern.integrations.peft import attach, is_attached

            # Before it is: an interrupt may come behind `attach`. What others attached is theirs.
            self._attached = None if is_attached(model) else model
            self._noise = attach(model, self._sigma, **options)
        else:
            self._noise = WeightNoise(model, self._sigma, **options)
        self._forwards = TrainingForwards(
            lambda: self._noise,
            without_grad=self._without_grad,
            in_eval=self._in_eval,
            look=self._look,
        )
        self._forwards.add(model)

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
        self._forwards.leave()
        self._noise.open(step=step, micro_batches=micro_batches)
        self._sigma_t = self._noise.sigma_t
        self._rise = None

    def _figures(self) -> dict[str, float]:
        """What the log says of the last window; waits for the device."""
        figures: dict[str, Any] = {"noise_sigma": self._sigma_t, "noise_loss_rise": self._rise}
        silent = 0 if self._noise is None else len(self._noise.silent)
        if silent:
            # No noise where no layer was called.
            figures = figures if silent < len(self._noise.names) else {}
            figures["noise_silent_layers"] = silent
        return {name: float(value) for name, value in figures.items() if value is not None}


def loss_rise(
    noise: WeightNoise, model: nn.Module, loss: Callable[[], Tensor | None]
) -> Tensor | None:
    """`loss()` under the open window's noise less `loss()` at clean weights; None if that is None.

    Costs two calls without gradients. Both draw the same random numbers, which the next forward
    draws again; the statistics of batch norms stay. Nothing is compiled for them.
    """
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = {"device_type": next(iter(devices)).type} if devices else {}
    losses = []
    for view in (contextlib.nullcontext, noise.paused):
        with (
            view(),
            _eagerly(),
            torch.no_grad(),
            still_statistics(model),
            torch.random.fork_rng(devices, **kind),
        ):
            value = loss()
        if value is None:
            return None
        losses.append(value.detach().float())
    return losses[0] - losses[1]


def _eagerly() -> contextlib.AbstractContextManager:
    """What is compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _has_peft_layers(model: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
