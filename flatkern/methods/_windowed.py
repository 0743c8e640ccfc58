"""What the methods share that train under random weight noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._layers import WeightGradient, recording
from flatkern.methods.base import LossFn, Method
from flatkern.nn import LoRALinear
from flatkern.nn.names import named_modules
from flatkern.noise import Fisher, WeightNoise
from flatkern.noise.schedules import Schedule


class Windowed(Method):
    """The mean gradient at w + e, one draw of e per optimizer step, shared by its micro-batches.

    The window is closed before the optimizer runs.

    Attributes:
        noise: the `WeightNoise`, whose step counts optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: float,
        schedule: Schedule | None = None,
        strategy: str,
        scope: str,
        mode: str = "virtual",
        seed: int = 0,
        ranks: str = "same",
        fisher: Fisher | None = None,
        **options: Any,
    ) -> None:
        """Make the noise.

        Args:
            model, optimizer, options: see `Method`.
            sigma, schedule, strategy, scope, mode, seed, ranks, fisher: see `WeightNoise`.

        Raises:
            TypeError, ValueError: see `Method` and `flatkern.WeightNoise`.
        """
        super().__init__(model, optimizer, **options)
        self.noise = WeightNoise(
            model,
            sigma,
            strategy=strategy,
            scope=scope,
            mode=mode,
            schedule=schedule,
            seed=seed,
            ranks=ranks,
            fisher=fisher,
        )
        self._fisher = fisher
        self._seen: dict[str, Tensor] = {}
        self._frozen = {} if fisher is None else self._frozen_layers()

    def _frozen_layers(self) -> dict[str, LoRALinear]:
        """The layers of the frozen weights in scope, whose gradients they can estimate."""
        frozen = [name for name in self.noise.names if name not in self.trainable()]
        layers = {
            f"{name}.weight": module
            for name, module in named_modules(self.model)
            if isinstance(module, LoRALinear)
        }
        unknown = [name for name in frozen if name not in layers]
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: scope must leave out frozen weights outside LoRALinear "
                f"layers under strategy 'fisher', which has no gradient to estimate their F from, "
                f"got {unknown[:8]}"
            )
        return {name: layers[name] for name in frozen}

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at w + e."""
        return self.noisy_gradient(loss_fn, batches)

    def noisy_gradient(self, loss_fn: LossFn, batches: Sequence[Any], weight: float = 1.0) -> float:
        """Add `weight` times the mean gradient at w + e to `.grad`; return the mean loss."""
        if self._fisher is None:
            with self.noise.window(micro_batches=len(batches)):
                return self.mean_gradient(loss_fn, batches, weight)
        trainable = self.trainable()
        before = {name: p.grad for name, p in trainable.items()}
        self.optimizer.zero_grad()
        gradients = {layer: WeightGradient(layer) for layer in self._frozen.values()}
        with self.noise.window(micro_batches=len(batches)), recording(gradients):
            loss = self.mean_gradient(loss_fn, batches, weight)
            squares = {name: gradients[layer].row_squares() for name, layer in self._frozen.items()}
        factor = weight * (1.0 if self.scaler is None else self.scaler.get_scale())
        for name in self.noise.names:
            if name in trainable and trainable[name].grad is not None:
                squares[name] = self.noise.row_squares(name, trainable[name].grad)
        self._seen = {name: square / factor**2 for name, square in squares.items()}
        for name, p in trainable.items():
            if before[name] is not None:
                p.grad = before[name] if p.grad is None else p.grad.add_(before[name])
        return loss

    def update(self) -> bool:
        """Step the optimizer, and with it F."""
        stepped = super().update()
        if stepped and self._fisher is not None:
            self._fisher.observe(self._seen)
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """The noise's seed and step, and F where there is one."""
        fisher = {} if self._fisher is None else {"fisher": self._fisher.state_dict()}
        return {"noise": self.noise.state_dict(), **fisher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        super().load_state_dict(state_dict)
        if self._fisher is not None:
            Fisher().load_state_dict(state_dict["fisher"])
        self.noise.load_state_dict(state_dict["noise"])
        if self._fisher is not None:
            self._fisher.load_state_dict(state_dict["fisher"])
