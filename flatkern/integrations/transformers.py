"""Noise windows and methods in `transformers.Trainer` and what is built on it, such as TRL's."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from flatkern.integrations._method_trainer import MethodTrainerMixin
from flatkern.integrations._run import NoisyRun, loss_rise
from flatkern.ops import _check

__all__ = ["FlatLoRACallback", "MethodTrainerMixin"]

_OP = "FlatLoRACallback"


class FlatLoRACallback(NoisyRun, TrainerCallback):
    """Flat-LoRA in a Trainer: each optimizer step's forwards and backwards run in one window.

        trainer = Trainer(model=get_peft_model(base, config), ...)
        FlatLoRACallback(sigma=0.05, seed=0).add_to(trainer)
        trainer.train()

    The model has PEFT's layers (`flatkern.integrations.peft.attach` is called at the begin of
    training, `detach` at its end) or flatkern's own. The window opens before the first micro-batch
    and closes before the optimizer, also on a short last group; after an out-of-memory retry with
    a smaller batch it opens anew. Its step is `state.global_step`, so a resumed run sees the same
    noise, to the bit, without anything saved. Forwards of a model in eval mode are clean at any
    time; so is every checkpoint.

    The log gets `noise_sigma`, sigma times the schedule's factor; and, where it is written every
    so many steps and the model's output has a loss, `noise_loss_rise`: how much the step's noise
    raises the loss of its first micro-batch. That takes two more forwards of it, without gradients
    and with the same dropout, at logged steps alone; the training keeps its bits.

    `Trainer(callbacks=[FlatLoRACallback(...)])` does the same, but such a callback runs after the
    reporters, so that its figures reach the trainer's log history alone, and nobody tells it of an
    exception in `train`: then a window stays open until `finish()` or the next `train`.
    """

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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the weights; what an earlier training left behind is taken away first."""
        self._begin(model, state.max_steps)
        self._pauses: list[contextlib.AbstractContextManager] = []
        self._due = False
        # generate() of a PeftModel calls the model inside, never the outer one.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        before = inner.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        after = inner.register_forward_hook(self._after_forward, always_call=True)
        self._cleanup.callback(before.remove)
        self._cleanup.callback(after.remove)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the step's window."""
        self._noise.close()
        self._open(state.global_step, args.gradient_accumulation_steps)
        self._due = self._measure and _is_logged(state.global_step + 1, args, state)

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
        """Add the figures beside the loss, for the callbacks that follow and the history."""
        if logs is None or "loss" not in logs:
            return
        figures = self._figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Clean weights for the forward of a model in eval mode, inside a window as well."""
        pause = contextlib.nullcontext() if model.training else self._noise.paused()
        pause.__enter__()
        self._pauses.append(pause)
        if self._due and model.training and torch.is_grad_enabled() and self._noise.active:
            self._due = False
            # Without it a loss is the mean over its own micro-batch.
            own = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
            self._rise = loss_rise(self._noise, model, lambda: _loss_of(model(*args, **own)))

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self._pauses.pop().__exit__(None, None, None)


def _is_logged(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer writes its log after that many steps, as far as is known beforehand."""
    if step == 1 and args.logging_first_step:
        return True
    every = state.logging_steps
    return args.logging_strategy == IntervalStrategy.STEPS and every > 0 and step % every == 0


def _loss_of(output: Any) -> torch.Tensor | None:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
