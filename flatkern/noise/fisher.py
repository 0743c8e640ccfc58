"""A running estimate of how large the gradients of each row are."""

from typing import Any

import torch
from torch import Tensor

from flatkern.ops import _check


class Fisher:
    """F_i <- beta F_i + sum_j g_ij^2 for every row i; noise is divided by sqrt(1 + eta F_i).

    There is no (1 - beta): a constant gradient takes F to g^2 / (1 - beta). Source: ARWP (Li et
    al., "Revisiting random weight perturbation", 2024).

    Attributes:
        rows: F by the weight's name, float32 [m]; none before the first `observe`.
    """

    def __init__(self, eta: float = 0.1, beta: float = 0.99) -> None:
        """Nothing is known yet.

        Args:
            eta: finite and at least 0; 0 changes no noise.
            beta: in [0, 1).

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value.
        """
        _check.kinds("Fisher", (float, int), eta=eta, beta=beta)
        _check.finite("Fisher", "eta", eta, minimum=0.0)
        if not 0 <= beta < 1:
            _check.refuse("Fisher", "beta", "in [0, 1)", beta)
        self.eta = eta
        self.beta = beta
        self.rows: dict[str, Tensor] = {}

    def observe(self, squares: dict[str, Tensor]) -> None:
        """Count the sums over each row of one step's squared gradients, by the weight's name."""
        for name, square in squares.items():
            before = self.rows.get(name)
            square = square.to(torch.float32)
            self.rows[name] = square if before is None else self.beta * before + square

    def divide(self, name: str, scale: Tensor) -> Tensor:
        """The row scale of a weight over sqrt(1 + eta F)."""
        rows = self.rows.get(name)
        return scale if rows is None else scale / (1 + self.eta * rows.to(scale.device)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """F of every weight."""
        return {name: rows.clone() for name, rows in self.rows.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; nothing is changed on an error.

        Raises:
            TypeError: not what `state_dict` gives.
        """
        _check.kinds("Fisher", dict, state_dict=state_dict)
        for name, rows in state_dict.items():
            _check.kinds("Fisher", Tensor, **{name: rows})
        self.rows = {name: rows.clone() for name, rows in state_dict.items()}
