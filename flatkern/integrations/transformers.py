"""Noise windows in `transformers.Trainer` and what is built on it, such as TRL's trainers."""

import contextlib
import functools
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_peft_available

from flatkern.noise import WeightNoise, constant, cosine_ramp, linear_ramp, lpf
from flatkern.noise.schedules import Schedule
from flatkern.ops import _check

_OP = "FlatLoRACallback"
_SCHEDULES = {"cosine_ramp": cosine_ramp, "linear_ramp": linear_ramp, "lpf": lpf}


class FlatLoRACallback(TrainerCallback):
    """Flat-LoRA in a Trainer: each optimizer step's forwards and backwards run in one window.

        trainer = Trainer(model=get_peft_model(base, config), ...)
        FlatLoRACallback(sigma=0.05, seed=0).add_to(trainer)
        trainer.train()

    The model has PEFT's layers (`flatkern.integrations.peft.attach` is called at the begin of
    training, `detach` at its end) or flatkern's own. The window opens before the first micro-batch
    and closes before the optimizer, also on a short last group; after an out-of-memory retry with
    a smaller batch it opens anew. Its step is `state.global_step`, so a resumed run sees the same
    noise, to the bit, without anything saved. Forwards of a model in eval mode are clean at any
    time; so is every checkpoint. The log gets `noise_sigma`, sigma times the schedule's factor.

    `Trainer(callbacks=[FlatLoRACallback(...)])` does the same, but such a callback runs after the
    reporters, so that `noise_sigma` reaches the trainer's log history alone, and nobody tells it
    of an exception in `train`: then a window stays open until `finish()` or the next `train`.
    """

    def __init__(
        self, sigma: float = 0.05, *, schedule: str | Schedule = "cosine_ramp", **options: Any
    ) -> None:
        """Nothing is changed before training begins.

        Args:
            sigma: as in `flatkern.WeightNoise`.
            schedule: "constant", or over the run's `max_steps`: "cosine_ramp", "linear_ramp" or
                "lpf"; or a function of the 0-based step.
            options: the other arguments of `flatkern.WeightNoise`: strategy, scope, mode, restore,
                seed, ranks, fisher. They are checked when training begins.

        Raises:
            TypeError, ValueError: `sigma` or `schedule` is of the wrong kind or value.
        """
        _check.kinds(_OP, (float, int), sigma=sigma)
        _check.finite(_OP, "sigma", sigma, minimum=0.0)
        if not callable(schedule):
            _check.one_of(_OP, ("constant", *_SCHEDULES), schedule=schedule)
        self._sigma = sigma
        self._schedule = schedule
        self._options = options
        self._noise: WeightNoise | None = None
        self._cleanup = contextlib.ExitStack()
        self._pauses: list[contextlib.AbstractContextManager] = []
        self._sigma_t: float | None = None

    @property
    def noise(self) -> WeightNoise | None:
        """The noise of the training that is under way, for `summary()` and `paused()`."""
        return self._noise

    def add_to(self, trainer: Trainer) -> None:
        """Put this before the trainer's other callbacks, and clean up after `train` on any exit.

        Raises:
            TypeError: not a Trainer.
            RuntimeError: the trainer has a FlatLoRACallback.
        """
        _check.kinds(_OP, Trainer, trainer=trainer)
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, FlatLoRACallback) for callback in callbacks):
            raise RuntimeError(f"{_OP}: the trainer has one already")
        callbacks.insert(0, self)
        train = trainer.train

        @functools.wraps(train)
        def train_and_finish(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self.finish()

        trainer.train = train_and_finish

    def finish(self) -> None:
        """Close the window and take everything off the model; harmless at any time."""
        if self._noise is not None:
            self._noise.close()
            self._noise = None
        self._cleanup.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the weights; what an earlier training left behind is taken away first."""
        self.finish()
        options = self._options | {"schedule": self._over(state.max_steps)}
        if _has_peft_layers(model):
            from flatkern.integrations.peft import attach, detach

            self._noise = attach(model, self._sigma, **options)
            self._cleanup.callback(detach, model)
        else:
            self._noise = WeightNoise(model, self._sigma, **options)
        # generate() of a PeftModel calls the model inside, never the outer one.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        before = inner.register_forward_pre_hook(self._pause)
        after = inner.register_forward_hook(self._resume, always_call=True)
        self._cleanup.callback(before.remove)
        self._cleanup.callback(after.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the step's window."""
        self._noise.close()
        self._noise.open(step=state.global_step)
        self._sigma_t = self._noise.sigma_t

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it: the optimizer sees the exact weights."""
        self._noise.close()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the window of a step that was given up half way."""
        self._noise.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take everything off the model."""
        self.finish()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `noise_sigma` beside the loss, for the callbacks that follow and the history."""
        if logs is not None and "loss" in logs and self._sigma_t is not None:
            logs["noise_sigma"] = self._sigma_t
            if state.log_history:
                state.log_history[-1]["noise_sigma"] = self._sigma_t

    def _over(self, max_steps: int) -> Schedule:
        if callable(self._schedule):
            return self._schedule
        make = _SCHEDULES.get(self._schedule)
        return constant() if make is None else make(max_steps)

    def _pause(self, model: nn.Module, args: Any) -> None:
        """Clean weights for the forward of a model in eval mode, inside a window as well."""
        pause = contextlib.nullcontext() if model.training else self._noise.paused()
        pause.__enter__()
        self._pauses.append(pause)

    def _resume(self, model: nn.Module, args: Any, output: Any) -> None:
        self._pauses.pop().__exit__(None, None, None)


def _has_peft_layers(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
