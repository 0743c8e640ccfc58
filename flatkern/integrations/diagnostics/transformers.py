"""Diagnostics in the log of `transformers.Trainer`, and so in TensorBoard, W&B and others."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatkern.integrations.diagnostics._figures import Figures, is_number
from flatkern.integrations.transformers import FlatLoRACallback, _calling_trainer


class DiagnosticsCallback(Figures, TrainerCallback):
    """Logs what the adapters, the noise and the loss around the weights are like.

        trainer = Trainer(
            model=get_peft_model(base, config),
            callbacks=[FlatLoRACallback(sigma=0.05), DiagnosticsCallback(sigma=0.05)],
            ...
        )

    Beside every training loss: `balancedness`, `condition_A`, `condition_A_max`, with `sigma` also
    `noise_to_weight` and `noise_BA_to_W` (see `flatkern.landscape.diagnostics`), and at chosen
    steps `flatness` with the ends of its interval. Beside every evaluation: `gap`, its loss less
    the last training loss. The training keeps its bits: all is measured outside windows, at clean
    weights, and no generator is moved.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before the reporters, and after what opens windows."""
        self._join()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also where it was added later."""
        self._join()
        self._begin()

    def _join(self) -> None:
        trainer = _calling_trainer()
        if trainer is None or self not in trainer.callback_handler.callbacks:
            return
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        windows = [i for i, each in enumerate(callbacks) if isinstance(each, FlatLoRACallback)]
        callbacks.insert(windows[-1] + 1 if windows else 0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures, for the callbacks that follow and the history."""
        if logs is None or model is None:
            return
        figures: dict[str, float] = {}
        if is_number(logs.get("loss")):
            figures = self._of_step(model, state.global_step, logs["loss"])
        elif is_number(logs.get("eval_loss")):
            figures = self._gap(logs["eval_loss"])
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
