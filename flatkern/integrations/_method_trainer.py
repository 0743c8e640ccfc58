"""Methods of `flatkern.methods` as the optimizer step of transformers' Trainer."""

import functools
import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from flatkern.integrations._forwards import TrainingForwards
from flatkern.integrations._state_files import load_state, save_state
from flatkern.methods._ranks import Ranks
from flatkern.methods.base import Method, keywords_of
from flatkern.nn import LoRALinear
from flatkern.noise import WeightNoise
from flatkern.ops import _check
from flatkern.ops._keywords import refuse_unknown

_OP = "MethodTrainerMixin"
_FILE, _OLD_FILE = "method.safetensors", "method.pt"
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class MethodTrainerMixin:
    """Mix in before a Trainer: its optimizer steps become those of a method, such as SAM's two.

        class SAMTrainer(MethodTrainerMixin, Trainer): ...

        trainer = SAMTrainer(model=model, args=args, ..., method=functools.partial(SAM, rho=0.05))

    The method gets all micro-batches of a step together, a short last group included, so that
    every pass runs over the same ones; they run where the Trainer has the last of them. Losses,
    their scaling by tokens and micro-batches, autocast, clipping, the GradScaler, the log and the
    learning rate remain the Trainer's. What the method remembers is saved in checkpoints.

    Attributes:
        method: the method of the training that is under way; None before.
    """

    def __init__(
        self,
        *args: Any,
        method: Callable[..., Method],
        noise_without_grad: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take a Trainer's arguments and a method.

        Args:
            args, kwargs: the Trainer's.
            method: a class of `flatkern.methods`, or a `functools.partial` of one; called as
                `method(model, optimizer, scaler=...)` when training begins. What it says of its
                options is said now, by making it once for a model of a single layer.
            noise_without_grad: whether forwards without gradients, such as those of a reference
                model, see the noise of the method's windows.

        Raises:
            TypeError: an argument of the wrong kind, or a keyword that the method does not have.
            ValueError: an option of the method out of range.
            RuntimeError: one of `callbacks` is a FlatLoRACallback.
        """
        _check.kinds(_OP, Callable, method=method)
        _check.kinds(_OP, bool, noise_without_grad=noise_without_grad)
        if isinstance(method, functools.partial):
            _refuse_misspelt(method)
        _try_out(method)
        self._forwards = TrainingForwards(
            self._open_noise, without_grad=noise_without_grad, in_eval=True
        )
        self._make_method = method
        self.method: Method | None = None
        self._in_eval = False
        self._wrapped: nn.Module | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; nothing is left on the model, whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._forwards.remove()

    def _open_noise(self) -> WeightNoise | None:
        return getattr(self.method, "noise", None)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; the method comes first: the scheduler wraps the optimizer's step."""
        self._bind()
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's: the micro-batches of a step, which the method needs together."""
        self._group, items = super().get_batch_samples(*args, **kwargs)
        return self._group, items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The method's gradient for the last micro-batch of a step; nothing for those before."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # An evaluation leaves eval mode behind; the Trainer's own step does the same.
        model.train()
        if self._wrapped is not model:
            # The method has the model itself; that ranks train it is said by what is around it.
            self._wrapped, self.method.ranks = model, Ranks(model)
        if not self._forwards.active:
            self._forwards.add(self.model)
            if model is not self.model:
                self._forwards.add(model)
        self._forwards.leave()
        # A method divides by the number of micro-batches, and the Trainer has done so.
        count = len(self._group)
        loss = self.method.gradient(
            lambda batch: self._scaled_loss(model, batch, num_items_in_batch) * count, self._group
        )
        return torch.tensor(loss, device=self.args.device)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, also for a method that runs in eval mode."""
        if self._in_eval:
            model.eval()
        return super().compute_loss(model, *args, **kwargs)

    def _scaled_loss(self, model: nn.Module, batch: dict[str, Any], items: Any) -> Tensor:
        """What the Trainer's own `training_step` runs backward from."""
        losses = []
        accelerator = self.accelerator
        accelerator.backward = lambda loss, **kwargs: losses.append(loss)
        # The Trainer's step calls train(), whatever mode the method chose.
        self._in_eval = not model.training
        try:
            super().training_step(model, batch, items)
        finally:
            self._in_eval = False
            del accelerator.backward
        return losses[0]

    def _bind(self) -> None:
        """Make the method, and let the optimizer's step be its update."""
        kind = self.accelerator.distributed_type
        if kind not in _DISTRIBUTED:
            accepted = f"one of {[each.value for each in _DISTRIBUTED]}"
            _check.refuse(_OP, "distributed_type", accepted, kind)
        accelerated = self.optimizer
        if not isinstance(accelerated, AcceleratedOptimizer):
            return  # Older versions prepare it after the scheduler is made.
        if self.method is not None and self.method.optimizer is accelerated.optimizer:
            return
        scaler = self.accelerator.scaler
        self.method = self._make_method(self.model, accelerated.optimizer, scaler=scaler)
        self._wrapped = None

        def step(accelerated: AcceleratedOptimizer, closure: None = None) -> None:
            accelerated._is_overflow = not self.method.update()

        # Bound, because learning rate schedulers take the function out of it.
        accelerated.step = MethodType(step, accelerated)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(self.method.state_dict(), os.path.join(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._bind()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if os.path.isfile(path := os.path.join(checkpoint, _FILE)):
            self.method.load_state_dict(load_state(path))
        elif os.path.isfile(os.path.join(checkpoint, _OLD_FILE)):
            raise ValueError(
                f"{checkpoint} holds a method's state as {_OLD_FILE}, which older versions wrote "
                "and this one does not unpickle; resume with the version that saved it"
            )


def _try_out(method: Callable[..., Method]) -> None:
    """The errors that flatkern's own methods have for their options, whatever the model."""
    kind = method.func if isinstance(method, functools.partial) else method
    ours = f"{Method.__module__.rpartition('.')[0]}."
    if not (isinstance(kind, type) and kind.__module__.startswith(ours)):
        return
    with torch.random.fork_rng(devices=[]):
        layer = LoRALinear(2, 2, r=1, bias=False)
    method(layer, torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.0))


def _refuse_misspelt(method: functools.partial) -> None:
    """TypeError for a keyword that neither the class nor those it is made of have."""
    kind = method.func
    if isinstance(kind, type) and issubclass(kind, Method):
        given = ("model", "optimizer")
        accepted = [name for name in keywords_of(kind) if name not in given]
        refuse_unknown(kind.__name__, accepted, method.keywords)
