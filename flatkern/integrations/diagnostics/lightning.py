"""Diagnostics in Lightning's log."""

from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from flatkern.integrations.diagnostics._figures import Figures


class DiagnosticsCallback(Figures, Callback):
    """Logs what the adapters, the noise and the loss around the weights are like.

        trainer = Trainer(callbacks=[FlatLoRACallback(sigma=0.05), DiagnosticsCallback(sigma=0.05)])

    At the steps that Lightning logs: `balancedness`, `condition_A`, `condition_A_max`, with `sigma`
    also `noise_to_weight` and `noise_BA_to_W` (see `flatkern.landscape.diagnostics`), and at chosen
    steps `flatness` with the ends of its interval. After a validation `gap`, if the metrics
    `train_loss` (or `loss`) and `val_loss` are logged. Everything is of clean weights, outside
    windows; the training keeps its bits.
    """

    _step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run."""
        self._begin()
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, behind the optimizer: no window is open then."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        # The same number again is a micro-batch in the middle of a step.
        if step == self._step or every <= 0 or step % every:
            return
        self._step = step
        metrics = trainer.callback_metrics
        loss = metrics.get("train_loss", metrics.get("loss"))
        figures = self._of_step(pl_module, step, None if loss is None else float(loss))
        always = {name: value for name, value in figures.items() if "flatness" not in name}
        self.log_dict(always, on_step=True, on_epoch=False)
        # Lightning would log the last one again at every step of the epoch.
        if seldom := {name: value for name, value in figures.items() if name not in always}:
            for logger in trainer.loggers:
                logger.log_metrics(seldom, step=step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The held-out loss less the training's."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and torch.isfinite(loss):
            self.log_dict(self._gap(float(loss)))
