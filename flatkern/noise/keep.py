"""How the clean bits of a weight are kept while noise is written in it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flatkern import ops
from flatkern.ops.residual import is_available, is_filled, pool_need

# Times the pool that a window was measured to need.
_SPARE = 1.1


class Keeper(Protocol):
    """Keeps one weight's clean bits, from `prepare` to `restore`, window after window.

    Every method may be interrupted and called again.
    """

    # Whether `restore` also serves a weight that was cast or moved since.
    survives_casts: bool

    def prepare(self, weight: Tensor, largest_scale: Callable[[], Tensor], key: Tensor) -> None:
        """Take the room that windows with a row scale up to `largest_scale()` need."""

    def perturb(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Write the noise."""

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Bring back the clean bits; does nothing if they are there."""

    def clean(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> Tensor:
        """A copy of the clean weight."""

    def nbytes(self) -> int:
        """Bytes that are held."""


class Snapshot:
    """A copy of the weight, on its device or in host memory."""

    survives_casts = True

    def __init__(self, host: bool) -> None:
        """Host memory is pinned where the weight is on a GPU."""
        self._host = host
        self._copy: Tensor | None = None

    def prepare(self, weight: Tensor, largest_scale: Callable[[], Tensor], key: Tensor) -> None:
        """Copy the weight."""
        like = (weight.shape, weight.dtype, self._device(weight))
        kept = self._copy
        if kept is None or (kept.shape, kept.dtype, kept.device) != like:
            with torch.inference_mode(False):
                self._copy = self._allocate(weight)
        self._copy.copy_(weight)

    def _device(self, weight: Tensor) -> torch.device:
        return torch.device("cpu") if self._host else weight.device

    def _allocate(self, weight: Tensor) -> Tensor:
        if not self._host:
            return torch.empty_like(weight)
        return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)

    def perturb(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Write the noise."""
        ops.perturb_(weight, row_scale, key)

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Copy back."""
        weight.copy_(self._copy)

    def clean(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> Tensor:
        """A copy of the copy; the module may have been cast or moved inside the window."""
        return self._copy.to(weight.device, weight.dtype, copy=True)

    def nbytes(self) -> int:
        """The weight's size, once a window was open."""
        return 0 if self._copy is None else self._copy.nbytes


class Residual:
    """What the noise takes from the weight, and no more: see `flatkern.ops.new_residual`."""

    survives_casts = False

    def __init__(self) -> None:
        """Nothing is allocated before the first window."""
        self._residual: Tensor | None = None
        self._like: tuple | None = None

    def prepare(self, weight: Tensor, largest_scale: Callable[[], Tensor], key: Tensor) -> None:
        """Size the pool by a perturbation without one, which counts and writes no weight."""
        like = (weight.shape, weight.dtype, weight.device)
        if self._like == like:
            return
        with torch.inference_mode(False):
            counter = ops.new_residual(weight, 0)
            ops.perturb_(weight, largest_scale(), key, residual=counter)
            self._residual = ops.new_residual(weight, int(pool_need(counter)[0] * _SPARE))
        self._like = like

    def perturb(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Write the noise; where the pool is too small, once more with a larger one."""
        ops.perturb_(weight, row_scale, key, residual=self._residual)
        need, left_out = pool_need(self._residual)
        if left_out:
            ops.restore_(weight, row_scale, key, residual=self._residual)
            with torch.inference_mode(False):
                self._residual = ops.new_residual(weight, int(need * _SPARE))
            ops.perturb_(weight, row_scale, key, residual=self._residual)
            ops.check_residual(self._residual)

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Decode in place."""
        if is_filled(self._residual):
            ops.restore_(weight, row_scale, key, residual=self._residual)

    def clean(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> Tensor:
        """Decode a copy."""
        copy, residual = weight.clone(), self._residual.clone()
        if is_filled(residual):
            ops.restore_(copy, row_scale, key, residual=residual)
        return copy

    def nbytes(self) -> int:
        """Header, directory and pool, once a window was open."""
        return 0 if self._residual is None else self._residual.nbytes


def keeper_of(restore: str | None, weight: Tensor, before: Keeper | None = None) -> Keeper:
    """The keeper that `WeightNoise(restore=...)` names: `before`, if that is one of its kind.

    None takes a residual where the backend has kernels for it. The reference, which takes
    full-size temporaries anyway, takes a snapshot.
    """
    if restore == "residual" or (restore is None and is_available(weight, native=True)):
        return before if isinstance(before, Residual) else Residual()
    return before if isinstance(before, Snapshot) else Snapshot(host=restore == "host")
