"""Noise windows in Lightning's Trainer."""

import contextlib
import functools
import inspect
from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from flatkern.integrations._run import NoisyRun, loss_rise
from flatkern.ops import _check

_OP = "FlatLoRACallback"


class FlatLoRACallback(NoisyRun, Callback):
    """Flat-LoRA in Lightning: each optimizer step is one window over its `training_step` calls.

        trainer = Trainer(callbacks=[FlatLoRACallback(sigma=0.05, seed=0)], ...)
        trainer.fit(module)

    The LightningModule holds PEFT's layers (attached when training begins, detached at its end) or
    flatkern's own, and optimizes automatically. The window opens before the first micro-batch of
    `accumulate_grad_batches` and closes before clipping and the optimizer, also on a short last
    group. Its step is `trainer.global_step`, so a resumed run sees the same noise, to the bit,
    without anything saved. Validation inside a window is clean, and so is every checkpoint; any
    exit leaves the exact weights. Forwards without gradients are clean, inside `training_step` as
    well; `noise_without_grad=True` shows them the noise.

    `noise_sigma`, sigma times the schedule's factor, is logged. With `measure=True` so is
    `noise_loss_rise`, by how much a step's noise raises the loss of its first micro-batch, at the
    steps that are logged. It takes two more `training_step` calls, without gradients, with the
    same dropout and nothing logged; but what such a call changes besides, a metric's sums for
    example, it changes each time.
    """

    # A LightningModule that keeps modules in eval mode, as they come pretrained, trains them so.
    _measures, _in_eval = False, True

    def _take_off(self) -> None:
        super()._take_off()
        self._validation.close()

    @functools.cached_property
    def _validation(self) -> contextlib.ExitStack:
        """The pause of a validation that is under way."""
        return contextlib.ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what gives no windows.

        Raises:
            ValueError: manual optimization, or a strategy that accumulates by itself.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            accepted = "True: in a loop of your own, use flatkern.WeightNoise"
            _check.refuse(_OP, "automatic_optimization", accepted, False)
        if trainer.strategy.handles_gradient_accumulation:
            accepted = "one that leaves accumulation to Lightning"
            _check.refuse(_OP, "strategy", accepted, type(trainer.strategy).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights."""
        self._begin(pl_module, trainer.estimated_stepping_batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the step's window before its first micro-batch."""
        if self._noise.active:
            return
        self._open(trainer.global_step, trainer.accumulate_grad_batches)
        every = trainer.log_every_n_steps
        if self._measure and every > 0 and (trainer.global_step + 1) % every == 0:
            with self._forwards.off():
                self._rise = loss_rise(
                    self._noise, pl_module, lambda: _loss_of(trainer, pl_module, batch, batch_idx)
                )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Close it: the optimizer sees the exact weights."""
        # Lightning's closure has run by now. Hooks of the optimizer itself come before the forward.
        self._noise.close()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, once the step's last micro-batch is through."""
        if not self._noise.active:
            self.log_dict(self._figures(), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the window of a step that was given up half way."""
        self._noise.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clean weights, also between the micro-batches of a step."""
        if self._noise is not None:
            self._validation.enter_context(self._noise.paused())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same noise again."""
        self._validation.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Exact weights, whatever happened."""
        self.finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take everything off the model."""
        self.finish()


def _loss_of(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """The loss of `training_step`, of whose calls of `log` nothing is kept."""
    given = (batch, batch_idx)
    try:
        inspect.signature(module.training_step).bind(*given)
    except TypeError:
        given = (batch,)
    # Instance attributes hide the methods.
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*given)
    finally:
        del module.log, module.log_dict
    return output["loss"] if isinstance(output, dict) else output
