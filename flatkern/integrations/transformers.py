"""Noise windows and methods in `transformers.Trainer` and what is built on it, such as TRL's."""

import functools
import sys
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

    Forwards without gradients are clean as well: a reference (another adapter, say), generation,
    old log-probabilities; `noise_without_grad=True` shows them the noise. Activation checkpointing
    of either kind keeps it.

    `Trainer(callbacks=[FlatLoRACallback(...)])` does the same. Either way the callback runs before
    the others, and any exit from `train` leaves the model clean and without it.
    """

    _joined: Trainer | None = None
    _due = False

    def add_to(self, trainer: Trainer) -> None:
        """Put this before the trainer's other callbacks, and clean up after `train` on any exit.

        Raises:
            TypeError: not a Trainer.
            RuntimeError: the trainer has a FlatLoRACallback, or a method.
        """
        _check.kinds(_OP, Trainer, trainer=trainer)
        if self in trainer.callback_handler.callbacks:
            raise RuntimeError(f"{_OP}: the trainer has one already")
        self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        """What `add_to` does; again, it does nothing."""
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(each, FlatLoRACallback) and each is not self for each in callbacks):
            raise RuntimeError(f"{_OP}: the trainer has one already")
        if isinstance(trainer, MethodTrainerMixin):
            raise RuntimeError(
                f"{_OP}: the trainer's step is that of a method (MethodTrainerMixin); take either "
                "the callback or the mixin, not both"
            )
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        if self._joined is trainer:
            return
        self._joined = trainer
        train = trainer.train

        @functools.wraps(train)
        def train_and_finish(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self.finish()

        trainer.train = train_and_finish

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before the reporters, also as one of `Trainer(callbacks=...)`."""
        if (trainer := _calling_trainer()) is not None:
            self._join(trainer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Find the weights; what an earlier training left behind is taken away first."""
        trainer = _calling_trainer()
        if trainer is not None:
            self._join(trainer)
        self._due = False
        self._begin(model, state.max_steps)
        # Around a compiled region, where the hooks inside it do nothing.
        wrapped = model if trainer is None else trainer.model_wrapped
        if wrapped is not model:
            self._forwards.add(wrapped)

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

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure at a step that will be logged, before its first forward."""
        if not self._due:
            return
        self._due = False
        # Without it a loss is the mean over its own micro-batch.
        own = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
        # Wrappers of the whole model pass on what they are given.
        inside = any(part is self._model for part in module.modules())
        model = self._model if inside else module
        with self._forwards.off():
            self._rise = loss_rise(self._noise, model, lambda: _loss_of(model(*args, **own)))


def _calling_trainer() -> Trainer | None:
    """The Trainer that runs its callbacks at the moment: it tells them everything but itself."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer
        frame = frame.f_back
    return None


def _is_logged(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer writes its log after that many steps, as far as is known beforehand."""
    if step == 1 and args.logging_first_step:
        return True
    every = state.logging_steps
    return args.logging_strategy == IntervalStrategy.STEPS and every > 0 and step % every == 0


def _loss_of(output: Any) -> torch.Tensor | None:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
