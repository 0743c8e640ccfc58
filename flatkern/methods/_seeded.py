"""What the methods share that make noise of their own for the trained weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern._version import NOISE_VERSION
from flatkern.methods.base import Method
from flatkern.nn import shards
from flatkern.noise import NoiseKey
from flatkern.noise.keys import check_version, check_words
from flatkern.noise.numbers import tensor_numbers
from flatkern.ops import _check

# Elements of uniform noise that are made at a time: 4 MiB.
_PANEL = 2**20


class Seeded(Method):
    """Noise from (seed, step, draw, tensor) alone; no global generator is read.

    A complex weight is its real and imaginary parts. Under FSDP2 a rank makes the noise of what it
    holds, from its place in the whole weight.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0, **options: Any
    ) -> None:
        """Take the seed.

        Args:
            model, optimizer, options: see `Method`.
            seed: in [0, 2^32).

        Raises:
            TypeError, ValueError: see `Method`; a seed of the wrong kind or value.
        """
        super().__init__(model, optimizer, **options)
        check_words(type(self).__name__, seed=seed)
        self._seed = seed
        self._step = 0
        self._told = False

    def keyed(self, draw: int = 0) -> list[tuple[nn.Parameter, NoiseKey]]:
        """The trained weights, each with the key of its noise in a draw of this step."""
        # In the order of the parameters, whatever their names are.
        numbers = tensor_numbers(self.model).values()
        return [
            (weight, NoiseKey(self._seed, self._step, draw, number))
            for weight, number in zip(self.model.parameters(), numbers, strict=True)
            if weight.requires_grad
        ]

    def update(self) -> bool:
        """Step the optimizer, and go on to other noise."""
        stepped = super().update()
        self._step += 1
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """The seed, the step and the version of the noise."""
        return {"seed": self._seed, "step": self._step, "noise_version": NOISE_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            TypeError, ValueError: not what `state_dict` gives; nothing is changed.
        """
        if isinstance(state_dict, dict):
            rest = check_version(type(self).__name__, state_dict)
            state_dict = {**rest, "noise_version": NOISE_VERSION}
        super().load_state_dict(state_dict)
        check_words(type(self).__name__, seed=state_dict["seed"], step=state_dict["step"])
        self._seed, self._step = state_dict["seed"], state_dict["step"]


def real_parts(weight: Tensor) -> Tensor:
    """The weight's real numbers, in its own memory, of at least one dimension."""
    weight = weight.detach()
    weight = torch.view_as_real(weight) if weight.is_complex() else weight
    return weight if weight.dim() else weight.view(1)


def normals_like(weight: Tensor, key: NoiseKey) -> Tensor:
    """z ~ N(0, 1) of a weight's shape, float32; sharded as the weight is, complex if it is."""
    part = shards.part_of(real_parts(weight))
    z = _values(ops.noise, part.local, key, part.row, part.col)
    if weight.is_complex():
        return torch.view_as_complex(z.view(*weight.shape, 2))
    return shards.like(z, weight)


@torch.no_grad()
def add_uniform_(weight: Tensor, row_scale: Tensor, key: NoiseKey) -> None:
    """weight += c u, u uniform in (-1, 1), rounded once; what would overflow stays.

    In panels, element by element as the kernels add normals: c u is rounded to float32 first.

    Args:
        weight: as `real_parts` gives it, written in place.
        row_scale: c, float32, one for each row of dim0 x rest of the whole weight.
        key: of u.
    """
    part = shards.part_of(weight)
    local = part.local
    columns = local.shape[1:].numel()
    scale = part.rows_of(row_scale).view(-1, *[1] * (local.dim() - 1))
    rows = max(_PANEL // max(columns, 1), 1)
    for begin in range(0, local.shape[0] if local.numel() else 0, rows):
        panel = local[begin : begin + rows]
        e = _values(ops.uniform, panel, key, part.row + begin, part.col)
        noisy = (panel + e.mul_(scale[begin : begin + rows])).to(panel.dtype)
        fine = noisy.isfinite() & panel.isfinite()
        panel.copy_(torch.where(fine, noisy, panel))


def _values(op: Callable[..., Tensor], like: Tensor, key: NoiseKey, row: int, col: int) -> Tensor:
    place = {"row_offset": row, "col_offset": col}
    rows, columns = like.shape[0], like.shape[1:].numel()
    return op(rows, columns, key.to(like.device), **place).view(like.shape)


def check_above_zero(name: str, **values: float) -> None:
    """TypeError or ValueError unless every named value is a finite number above 0."""
    for argument, value in values.items():
        _check.kinds(name, (float, int), **{argument: value})
        _check.finite(name, argument, value)
        if not value > 0:
            _check.refuse(name, argument, "above 0", value)
