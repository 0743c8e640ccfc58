"""What every method shares: one optimizer step over a list of micro-batches."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from flatkern.methods._ranks import Ranks
from flatkern.nn.names import named_parameters
from flatkern.noise.whole import require_whole
from flatkern.ops import _check
from flatkern.ops._keywords import refuse_unknown

LossFn = Callable[[Any], Tensor]


class Method:
    """Plain gradient descent.

    A method overrides `gradient`; `update`, if it does more at the update than the optimizer; and
    the two `state_dict` functions, if it remembers anything from step to step.

    Attributes:
        model, optimizer, max_grad_norm, scaler: as given.
        ranks: those that train the model together, found in it.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """TypeError for a keyword that neither the class nor those it is made of have."""
        if cls.__module__.startswith(f"{__package__}."):
            refuse_unknown(cls.__name__, keywords_of(cls), options)
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Take a model and the optimizer of all its trainable parameters.

        Args:
            model: trained as it is; its mode and its frozen weights are not touched. Where ranks
                train it together, the DistributedDataParallel module itself.
            optimizer: steps without a closure.
            max_grad_norm: the update's gradient is clipped to this norm, above 0.
            scaler: scales the losses and skips updates that are not finite; the step is counted
                all the same. Its state is saved with its own `state_dict`.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: nothing is trainable, or something that is not all there (FSDP version 1,
                ZeRO-3, meta tensors) or neither floating point of 16 to 64 bits nor complex; the
                optimizer lacks trainable parameters, needs a closure or steps during backward; a
                wrong norm.
        """
        name = type(self).__name__
        _check.kinds(name, nn.Module, model=model)
        _check.kinds(name, torch.optim.Optimizer, optimizer=optimizer)
        _check.kinds(name, (float, int), optional=True, max_grad_norm=max_grad_norm)
        _check.kinds(name, torch.amp.GradScaler, optional=True, scaler=scaler)
        if max_grad_norm is not None and not max_grad_norm > 0:
            _check.refuse(name, "max_grad_norm", "above 0", max_grad_norm)
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.ranks = Ranks(model)
        trainable = self.trainable()
        if not trainable:
            raise ValueError(f"{name}: model must have trainable parameters, got none")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [key for key, p in trainable.items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"{name}: optimizer must hold every trainable parameter of the model (was it made "
                f"before the layers were replaced?), got none of {missing[:8]}"
            )
        self._require_whole()
        unknown = [key for key, p in trainable.items() if not _is_number(p.dtype)]
        if unknown:
            raise ValueError(
                f"{name}: trainable parameters must be floating point of 16 to 64 bits or complex, "
                f"got {[f'{key}: {trainable[key].dtype}' for key in unknown[:8]]}"
            )
        # What torch.distributed.optim's optimizer-in-backward leaves on its parameters.
        inside = [key for key, p in trainable.items() if hasattr(p, "_in_backward_optimizers")]
        if inside:
            raise ValueError(
                f"{name}: optimizer must step after the backwards alone, got one that steps inside "
                f"them for {inside[:8]}"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            kind = type(optimizer).__name__
            raise ValueError(f"{name}: optimizer must step without a closure, got {kind}")

    def _require_whole(self) -> None:
        for key, p in self.trainable().items():
            require_whole(type(self).__name__, key, p)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The model's trainable parameters by name, as the unwrapped model has them."""
        return {key: p for key, p in named_parameters(self.model) if p.requires_grad}

    def step(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """One optimizer step: forwards, backwards, `optimizer.step()` and `zero_grad()`.

        Gradients belong to the step: cleared before it and after it, errors included.

        Args:
            loss_fn: takes one of `batches`, returns its mean loss, a scalar tensor.
            batches: the micro-batches, a list or tuple of at least one; the step's gradient is
                the mean over them.

        Where ranks train together (DDP, FSDP2), each has batches of its own; the gradient and the
        loss are the means of theirs, and what else a method takes from batches is of all of them.

        Returns:
            the mean loss of the pass that the update uses.

        Raises:
            TypeError, ValueError: `batches` or a loss of the wrong kind or shape, no batches.
            RuntimeError: a loss that does not depend on trainable parameters; a weight that is
                written during a backward; a model inside the DDP module that loss_fn calls.
        """
        name = type(self).__name__
        _check.kinds(name, Callable, loss_fn=loss_fn)
        _check.kinds(name, (list, tuple), batches=batches)
        if not batches:
            raise ValueError(f"{name}: batches must hold at least one batch, got none")
        self._require_whole()
        self.optimizer.zero_grad()
        try:
            loss = self.gradient(loss_fn, batches)
            self._unscale_and_update()
        finally:
            self.optimizer.zero_grad()
            # An autocast around the steps would go on using its casts of the old weights.
            torch.clear_autocast_cache()
        return loss

    def _unscale_and_update(self) -> None:
        if self.scaler is None:
            self.update()
            return
        try:
            self.scaler.unscale_(self.optimizer)
            self.update()
        except BaseException:
            # The scaler forgets this step, which would otherwise be refused when it is repeated.
            self.scaler.update(self.scaler.get_scale())
            raise

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """Leave the step's gradient in `.grad` and clean weights; return the mean loss.

        With a scaler the gradient is scaled.
        """
        return self.mean_gradient(loss_fn, batches)

    def update(self) -> bool:
        """Clip the gradient in `.grad`, which is not scaled any more, and step the optimizer.

        Returns:
            whether it was stepped: False if the scaler skipped a gradient that is not finite.
        """
        if self.max_grad_norm is not None:
            self._clip(self.max_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
            return True
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _clip(self, max_norm: float) -> None:
        weights = [p for p in self.trainable().values() if p.grad is not None]
        if not any(p.grad.is_sparse for p in weights):
            nn.utils.clip_grad_norm_(weights, max_norm)
            return
        for p in weights:
            if p.grad.is_sparse:
                # Of repeated indices the sums.
                p.grad = p.grad.coalesce()
        values = [p.grad._values() if p.grad.is_sparse else p.grad for p in weights]
        factor = max_norm / (nn.utils.get_total_norm(values) + 1e-6)
        for value in values:
            value.mul_(factor.clamp(max=1.0).to(value.device))

    def mean_gradient(self, loss_fn: LossFn, batches: Sequence[Any], weight: float = 1.0) -> float:
        """Add `weight` times the mean gradient over `batches` to `.grad`; return the mean loss."""
        return self.mean_number(self.own_gradient(loss_fn, batches, weight), len(batches))

    def own_gradient(
        self, loss_fn: LossFn, batches: Sequence[Any], weight: float = 1.0, apart: bool = False
    ) -> Tensor | float:
        """As `mean_gradient`, but return the sum of this rank's losses; see `add_gradient`."""
        total = 0.0
        for index in range(len(batches)):
            total = total + self.add_gradient(loss_fn, batches, index, weight, apart)
        # Added on the device: one synchronisation per step.
        return total

    def mean_number(self, total: Tensor | float, count: int) -> float:
        """total / count, the mean of it over the ranks."""
        if self.ranks.size == 1:
            return float(total) / count
        device = next(iter(self.trainable().values())).device
        # Wide: ranks may have losses of different dtypes, or none.
        wide = torch.as_tensor(total, dtype=torch.float64, device=device) / count
        return float(self.ranks.mean(wide))

    def add_gradient(
        self,
        loss_fn: LossFn,
        batches: Sequence[Any],
        index: int,
        weight: float = 1.0,
        apart: bool = False,
    ) -> Tensor:
        """Add a batch's part of `weight` times the mean gradient to `.grad`; return its loss, wide.

        A DDP model's ranks share what they have added with the last batch, not with every one;
        `apart`, not at all.
        """
        with self.ranks.alone(apart or index + 1 < len(batches)):
            loss = self.loss(loss_fn, batches[index])
            if not loss.requires_grad:
                raise RuntimeError(
                    f"{type(self).__name__}: loss_fn's loss has no gradient: it depends on no "
                    "trainable parameter, was detached, or gradients are off"
                )
            versions = self._versions()
            self.scaled(loss / len(batches) * weight).backward()
        if self._versions() != versions:
            raise RuntimeError(
                f"{type(self).__name__}: a trainable parameter was written during a backward, by "
                "an optimizer in its hooks, it seems; a method makes the optimizer's steps after "
                "its passes"
            )
        return _wide(loss)

    def _versions(self) -> list[int]:
        return [p._version for group in self.optimizer.param_groups for p in group["params"]]

    def mean_loss(self, loss_fn: LossFn, batches: Sequence[Any]) -> Tensor:
        """The mean loss over `batches`, without gradients, of all ranks."""
        with torch.no_grad():
            own = sum(_wide(self.loss(loss_fn, batch)) for batch in batches) / len(batches)
        return self.ranks.mean(own)

    def scaled(self, value: Tensor) -> Tensor:
        """`value`, a loss or a gradient, times the scaler's scale."""
        return value if self.scaler is None else self.scaler.scale(value)

    def loss(self, loss_fn: LossFn, batch: Any) -> Tensor:
        """`loss_fn(batch)`, which must be a scalar tensor."""
        with self.ranks.checked(type(self).__name__, self.model):
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
        expected, got = sorted(self.state_dict()), sorted(state_dict)
        if got != expected:
            raise ValueError(f"{name}: state_dict must have the keys {expected}, got {got}")


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def _wide(loss: Tensor) -> Tensor:
    return loss.detach().to(torch.promote_types(loss.dtype, torch.float32))


def keywords_of(method: type[Method]) -> list[str]:
    """What the class and those that it is made of take by name."""
    parameters = [
        one
        for base in method.__mro__
        for one in inspect.signature(base.__init__).parameters.values()
    ]
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return list(dict.fromkeys(p.name for p in parameters if p.kind in kinds and p.name != "self"))
