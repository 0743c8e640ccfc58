"""ASAM: SAM in a ball that scales with the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.ops import _check

# Name: (eta, the fewest dimensions of a tensor that is scaled).
PRESETS = {"samsung": (0.01, 2), "davda54": (0.0, 0)}


class ASAM(Ascent):
    """The gradient at w + e with e = rho T^2 g / ||T g||, T = |w| + eta, g the gradient at w.

    Rescaling weights between layers does not change the sharpness that it sees. Source: Kwon et
    al., "ASAM: adaptive sharpness-aware minimization", 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.5,
        eta: float | None = None,
        preset: str = "samsung",
        norm: str = "joint",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Perturb every trainable parameter.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0; about 10 times SAM's.
            eta: finite and at least 0; None takes the preset's.
            preset: "samsung" (SamsungLabs/ASAM): eta 0.01, and T = 1 for tensors with fewer than
                two dimensions; "davda54" (davda54/sam): T = |w| for all.
            norm: "joint", one ball for all tensors, or "per_tensor", one for each.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            options: `schedule` of rho, `ascents` and `seed`, see `Ascent` in _ascent.py; those of
                `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        _check.one_of("ASAM", tuple(PRESETS), preset=preset)
        own_eta, self._dimensions = PRESETS[preset]
        _check.kinds("ASAM", (float, int), optional=True, eta=eta)
        self.eta = own_eta if eta is None else eta
        _check.finite("ASAM", "eta", self.eta, minimum=0.0)

    def metric(self, weight: Tensor) -> Tensor | float:
        """T = |w| + eta, or 1."""
        if weight.dim() < self._dimensions:
            return 1.0
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs() + self.eta
