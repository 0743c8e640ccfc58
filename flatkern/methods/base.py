"""What every method shares: one optimizer step over a list of micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.ops import _check

LossFn = Callable[[Any], Tensor]


class Method:
    """Plain gradient descent; a method overrides `gradient`, and more only if it has a state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a model and the optimizer of all its trainable parameters.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: nothing is trainable, or the optimizer lacks trainable parameters.
        """
        name = type(self).__name__
        _check.kinds(name, nn.Module, model=model)
        _check.kinds(name, torch.optim.Optimizer, optimizer=optimizer)
        trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{name}: model must have trainable parameters, got none")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [key for key, p in trainable.items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"{name}: optimizer must hold every trainable parameter of the model (was it made "
                f"before the layers were replaced?), got none of {missing[:8]}"
            )
        self.model = model
        self.optimizer = optimizer

    def step(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """One optimizer step: forwards, backwards, `optimizer.step()` and `zero_grad()`.

        Gradients belong to the step: cleared before it and after it, errors included.

        Args:
            loss_fn: takes one of `batches`, returns its mean loss, a scalar tensor.
            batches: the micro-batches, a list or tuple of at least one; the step's gradient is
                the mean over them.

        Returns:
            the mean loss of the pass that the update uses.

        Raises:
            TypeError, ValueError: `batches` or a loss of the wrong kind or shape, no batches.
            RuntimeError: a loss that does not depend on trainable parameters.
        """
        name = type(self).__name__
        _check.kinds(name, Callable, loss_fn=loss_fn)
        _check.kinds(name, (list, tuple), batches=batches)
        if not batches:
            raise ValueError(f"{name}: batches must hold at least one batch, got none")
        self.optimizer.zero_grad()
        try:
            loss = self.gradient(loss_fn, batches)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return loss

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Leave the step's gradient in `.grad` and clean weights; return the mean loss."""
        return self.mean_gradient(loss_fn, batches)

    def mean_gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Add the mean gradient over `batches` to `.grad`; return the mean loss."""
        total = 0.0
        for batch in batches:
            loss = self.loss(loss_fn, batch)
            if not loss.requires_grad:
                raise RuntimeError(
                    f"{type(self).__name__}: loss_fn's loss has no gradient: it depends on no "
                    "trainable parameter, was detached, or gradients are off"
                )
            (loss / len(batches)).backward()
            # Added on the device, wide: one synchronisation per step.
            total = total + loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        return float(total) / len(batches)

    def loss(self, loss_fn: LossFn, batch: Any) -> Tensor:
        """`loss_fn(batch)`, which must be a scalar tensor."""
        loss = loss_fn(batch)
        _check.kinds(type(self).__name__, Tensor, loss=loss)
        if loss.dim() != 0:
            _check.refuse(type(self).__name__, "loss", "a scalar", loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers from step to step, beside model and optimizer."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        name = type(self).__name__
        _check.kinds(name, dict, state_dict=state_dict)
        if state_dict:
            raise ValueError(f"{name}: state_dict must be empty, got {sorted(state_dict)}")
