"""What the methods share that train under random weight noise."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods import _rounding
from flatkern.methods._layers import WeightGradient, recording
from flatkern.methods._ranks import dense
from flatkern.methods.base import LossFn, Method
from flatkern.nn.sites import site_of
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
        self._told = False

    def _weights(self) -> dict[str, nn.Parameter]:
        """The weights in scope by the noise's names for them."""
        return {t.name: getattr(*t.owners[0]) for t in self.noise._targets}

    def _frozen_layers(self) -> dict[str, list[nn.Module]]:
        """The layers of the frozen weights in scope, whose gradients they can estimate."""
        layers: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            site = site_of(module)
            if site is not None and site.weight is not None and site.linear:
                layers.setdefault(id(site.weight), []).append(module)
        frozen = {name: w for name, w in self._weights().items() if not w.requires_grad}
        unknown = [name for name, weight in frozen.items() if id(weight) not in layers]
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: scope must leave out frozen weights outside LoRALinear "
                "and attached linear layers under strategy 'fisher', which has no gradient to "
                f"estimate their F from, got {unknown[:8]}"
            )
        return {name: layers[id(weight)] for name, weight in frozen.items()}

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient at w + e."""
        return self.noisy_gradient(loss_fn, batches)

    def noisy_gradient(
        self,
        loss_fn: LossFn,
        batches: Sequence[Any],
        weight: float = 1.0,
        share: float = 1.0,
        apart: bool = False,
    ) -> float:
        """Add `weight` times the mean gradient at w + e to `.grad`; return the mean loss.

        Args:
            loss_fn, batches, weight: as in `mean_gradient`; there may be no batches.
            share: what this rank's mean counts in that of all ranks.
            apart: ranks may have run other numbers of passes; they share gradients here.
        """
        if self._fisher is None and not apart:
            with self.window(micro_batches=len(batches)):
                return self.mean_gradient(loss_fn, batches, weight)
        trainable = self.trainable().values()
        before = [p.grad for p in trainable]
        self.optimizer.zero_grad()
        layers = {name: WeightGradient(modules[0]) for name, modules in self._frozen.items()}
        recorded = {m: layers[name] for name, modules in self._frozen.items() for m in modules}
        count = max(len(batches), 1)
        with self.window(micro_batches=count), recording(recorded, of_noisy=True):
            if not batches:
                self.noise._weights.calls.expect_none()
            total = self.own_gradient(loss_fn, batches, weight * share, apart)
        if apart:
            self.ranks.average_gradients(list(trainable))
        squares = {}
        for name, gradient in layers.items():
            gradient.average(self.ranks)
            squares[name] = gradient.row_squares()
        factor = weight * (1.0 if self.scaler is None else self.scaler.get_scale())
        for name, p in self._weights().items() if self._fisher is not None else ():
            if p.requires_grad and p.grad is not None:
                squares[name] = self.noise.row_squares(name, dense(p.grad))
        self._seen = {name: square / factor**2 for name, square in squares.items()}
        for p, grad in zip(trainable, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)
        return self.mean_number(share * total, count)

    @contextlib.contextmanager
    def window(self, *args: Any, **options: Any) -> Iterator[None]:
        """The noise's; the first that has noise warns if 16-bit weights lose most of it."""
        with self.noise.window(*args, **options):
            sigma_t = self.noise.sigma_t
            if not self._told and sigma_t > 0:
                self._told = True
                ramp = self.noise._sigma / sigma_t
                parts = [
                    (part.local, ramp * part.rows_of(state.row_scale), state.elementwise)
                    for state in self.noise._states
                    if state.target.quantized is None
                    for part in [state.target.part]
                ]
                _rounding.tell_of_noise(type(self).__name__, parts, "noise of this sigma")
            yield

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
