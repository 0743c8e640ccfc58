"""Diagnostics in the log of `transformers.Trainer`, and so in TensorBoard, W&B and others."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatkern.integrations.diagnostics._figures import Figures, Loss, is_number
from flatkern.integrations.transformers import FlatLoRACallback, _calling_trainer

_OP = "DiagnosticsCallback"


class DiagnosticsCallback(TrainerCallback):
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

    def __init__(
        self,
        sigma: float | None = None,
        *,
        strategy: str = "flat_lora",
        loss_fn: Loss | None = None,
        flatness_every: int = 0,
        draws: int = 4,
        seed: int = 0,
        prefix: str = "",
    ) -> None:
        """Nothing is measured before the first log.

        Args:
            sigma: strength of the noise whose size is logged; None: no such figures.
            strategy: its strategy.
            loss_fn: takes the model and returns the loss of held-out data, always the same.
            flatness_every: `flatness` at the first log after every so many steps; 0: never. It
                takes 2 draws + 2 evaluations.
            draws, seed: as in `flatkern.landscape.average_flatness`, whose sigma is `sigma`, or
                0.05.
            prefix: of the names in the log.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value.
        """
        self._figures = Figures(
            _OP,
            sigma=sigma,
            strategy=strategy,
            loss_fn=loss_fn,
            flatness_every=flatness_every,
            draws=draws,
            seed=seed,
            prefix=prefix,
        )

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
        self._figures.begin()

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
            figures = self._figures.of_step(model, state.global_step, logs["loss"])
        elif is_number(logs.get("eval_loss")):
            figures = self._figures.gap(logs["eval_loss"])
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
