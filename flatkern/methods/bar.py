"""BAR: the balancing that SAM does to A and B, without its second pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flatkern.methods import _rounding
from flatkern.methods._ascent import wide_norm
from flatkern.methods._layers import Pair, lora_layers
from flatkern.methods.base import Method
from flatkern.nn.shards import part_of
from flatkern.noise import NoiseKey
from flatkern.noise.schedules import Schedule, constant, factor_at
from flatkern.ops import _check

VARIANTS = ("nBAR", "oBAR")


class BAR(Method):
    """Before each update, of every layer one adapter grows by 1 + a lr and the other shrinks.

    nBAR: B grows if ||dB|| >= ||dA||, their gradients, else A. oBAR: A grows if ||B|| >= ||A||,
    else B. Either multiplies B A by 1 - a^2 lr^2. Source: Li et al., "Implicit regularization of
    sharpness-aware minimization for scale-invariant problems", 2024, algorithms 2 and 3.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        alpha: float = 1.0,
        variant: str = "nBAR",
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        """Balance the adapters of every LoRALinear and PEFT LoRA layer.

        Args:
            model, optimizer, options: see `Method`.
            alpha: a, finite and at least 0; the source tries 0.5, 1 and 2.
            variant: "nBAR" or "oBAR".
            schedule: factor of alpha as a function of the 0-based step; None: constant. The
                source lets it fall to 0 at the end of the training.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or a model
                without such layers whose A and B are trained.
        """
        super().__init__(model, optimizer, **options)
        _check.kinds("BAR", (float, int), alpha=alpha)
        _check.finite("BAR", "alpha", alpha, minimum=0.0)
        _check.one_of("BAR", VARIANTS, variant=variant)
        _check.kinds("BAR", Callable, optional=True, schedule=schedule)
        self.alpha = alpha
        self.variant = variant
        self._schedule = schedule or constant()
        self._step = 0
        lora_layers(self, "pairs")

    def update(self) -> bool:
        """Balance, then clip and step; where the optimizer is not stepped, A and B stay."""
        strength = self.alpha * factor_at("BAR", self._schedule, self._step)
        pairs = [p for layer in lora_layers(self, "pairs") for p in layer.pairs if p.learns]
        rates = {
            id(p): float(group["lr"])
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        # Of sharded adapters what this rank holds: the list op takes no DTensors.
        adapters = [part_of(part.detach()).local for pair in pairs for part in (pair.A, pair.B)]
        before = [part.clone() for part in adapters]
        stepped = False
        try:
            for number, pair in enumerate(pairs):
                self._balance(pair, strength * rates[id(pair.B)], number)
            stepped = super().update()
        finally:
            if not stepped:
                torch._foreach_copy_(adapters, before)
        self._step += stepped
        return stepped

    def _balance(self, pair: Pair, amount: float, number: int) -> None:
        """Grow one adapter by 1 + amount; nothing waits for the norms."""
        if amount >= 1:
            _check.refuse("BAR", "alpha", "below 1 / the learning rate", self.alpha)
        A, B = pair.A, pair.B
        if self.variant == "nBAR":
            grow_B = wide_norm(B.grad) >= wide_norm(A.grad)
        else:
            grow_B = wide_norm(B.detach()) < wide_norm(A.detach())
        signed = (2 * grow_B.to(torch.promote_types(A.dtype, torch.float32)) - 1) * amount
        for part, factor, own in ((B, signed, 0), (A, -signed, 1)):
            if _rounding.is_coarse(part.dtype):
                # 1 + a lr is 1 in 16 bits.
                key = NoiseKey(0, self._step, tensor=2 * number + own)
                _rounding.add_(part.detach(), part.detach().float() * factor, key)
            else:
                part.detach().mul_(1 + factor)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates so far, which the schedule counts."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        super().load_state_dict(state_dict)
        step = state_dict["step"]
        _check.kinds("BAR", int, step=step)
        if step < 0:
            _check.refuse("BAR", "step", "at least 0", step)
        self._step = step
