"""What the callbacks of all trainers log, and when."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from flatkern.integrations._run import _has_peft_layers
from flatkern.landscape import average_flatness
from flatkern.landscape.diagnostics import adapter_figures
from flatkern.ops import _check

Loss = Callable[[nn.Module], Tensor]


class Figures:
    """Diagnostics of a model that is trained, by their names in the log; a trainer's callback.

    It calls `_begin` at the begin of a run, `_of_step` where a step is logged, and `_gap` behind an
    evaluation.
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
        """Nothing is measured before the first logged step.

        Args:
            sigma: strength of the noise whose size is logged; None: no such figures.
            strategy: its strategy.
            loss_fn: takes the model (in Lightning the LightningModule) and returns the loss of
                held-out data, always the same; it logs nothing.
            flatness_every: `flatness` at the first logged step after every so many; 0: never. It
                takes 2 draws + 2 evaluations.
            draws, seed: as in `flatkern.landscape.average_flatness`, whose sigma is `sigma`, or
                0.05.
            prefix: of the names in the log.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value.
        """
        op = type(self).__name__
        _check.kinds(op, (float, int), optional=True, sigma=sigma)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"{op}: loss_fn must be callable or None, got {type(loss_fn).__name__}")
        _check.kinds(op, int, flatness_every=flatness_every, draws=draws)
        if flatness_every < 0:
            _check.refuse(op, "flatness_every", "at least 0", flatness_every)
        if flatness_every and loss_fn is None:
            accepted = "given where flatness_every is: it takes the model and returns the loss"
            _check.refuse(op, "loss_fn", accepted, loss_fn)
        _check.kinds(op, str, prefix=prefix)
        self._sigma, self._strategy = sigma, strategy
        self._loss_fn, self._every = loss_fn, flatness_every
        self._draws, self._seed, self._prefix = draws, seed, prefix
        self._measured = -1
        self._train_loss: float | None = None

    def _begin(self) -> None:
        """Of a new run."""
        self._measured, self._train_loss = 0, None

    def _of_step(self, model: nn.Module, step: int, loss: float | None) -> dict[str, float]:
        """At a step whose log is written: of clean weights, outside windows."""
        if loss is not None:
            self._train_loss = loss
        with _attached(model):
            found = adapter_figures(model, sigma=self._sigma, strategy=self._strategy)
            if self._every and step // self._every > self._measured // self._every:
                found |= self._flatness(model)
                self._measured = step
        return {f"{self._prefix}{name}": value for name, value in found.items()}

    def _flatness(self, model: nn.Module) -> dict[str, float]:
        sigma = 0.05 if self._sigma is None else self._sigma
        options = {"sigma": sigma, "strategy": self._strategy, "draws": self._draws}
        found = average_flatness(
            model, lambda: self._loss_fn(model), seed=self._seed, scope="merged", **options
        )
        low, high = found.interval
        return {"flatness": float(found), "flatness_low": low, "flatness_high": high}

    def _gap(self, eval_loss: float) -> dict[str, float]:
        """The held-out loss less that of the training before it, if one was logged."""
        if self._train_loss is None:
            return {}
        return {f"{self._prefix}gap": eval_loss - self._train_loss}


@contextlib.contextmanager
def _attached(model: nn.Module) -> Iterator[None]:
    """PEFT's layers as sites, for as long as somebody looks; as they were afterwards."""
    if not _has_peft_layers(model):
        yield
        return
    from flatkern.integrations import peft

    if peft._sites(model):
        yield
        return
    peft.attach(model)
    try:
        yield
    finally:
        peft.detach(model)


def is_number(value: Any) -> bool:
    """Whether a log's entry is one."""
    return isinstance(value, float | int) and not isinstance(value, bool)
