"""How the clean bits of a weight are kept while noise is written in it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flatkern import ops
from flatkern.ops._residual import FILLED, Header, in_kernels, raise_for, read_all
from flatkern.ops.residual import is_available, is_filled, pool_need

# Times the pool that a window was measured to need.
_SPARE = 1.1


class Keeper(Protocol):
    """Keeps one weight's clean bits, from `prepare` to `restore`, window after window.

    Every method may be interrupted and called again. CUDA kernels leave what they refused in the
    residual's header: `read_outcomes` reads those of all weights with one copy, for
    `confirm_perturbed` and `confirm_restored`.
    """

    # Whether `restore` also serves a weight that was cast or moved since.
    survives_casts: bool

    def prepare(self, weight: Tensor, largest_scale: Callable[[], Tensor], key: Tensor) -> None:
        """Take the room that windows with a row scale up to `largest_scale()` need."""

    def perturb(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Write the noise."""

    def confirm_perturbed(
        self, outcome: Header | None, weight: Tensor, row_scale: Tensor, key: Tensor
    ) -> None:
        """Raise, or perturb once more, unless all noise was written."""

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Bring back the clean bits; does nothing if they are there."""

    def confirm_restored(self, outcome: Header | None) -> None:
        """Raise unless the clean bits are there."""

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

    def confirm_perturbed(
        self, outcome: Header | None, weight: Tensor, row_scale: Tensor, key: Tensor
    ) -> None:
        """Nothing can be refused."""

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Copy back."""
        weight.copy_(self._copy)

    def confirm_restored(self, outcome: Header | None) -> None:
        """Nothing can be refused."""

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
        """Size the pool by a perturbation without one, which counts and writes no weight.

        A CUDA graph that is being captured cannot count or grow: it takes the worst case.
        """
        capturing = _is_capturing(weight)
        like = (weight.shape, weight.dtype, weight.device)
        if self._like in ((*like, capturing), (*like, True)):
            return
        with torch.inference_mode(False):
            pool_bytes = None
            if not capturing:
                counter = ops.new_residual(weight, 0)
                ops.perturb_(weight, largest_scale(), key, residual=counter)
                pool_bytes = int(pool_need(counter)[0] * _SPARE)
            self._residual = ops.new_residual(weight, pool_bytes)
        self._like = (*like, capturing)

    def perturb(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Write the noise."""
        ops.perturb_(weight, row_scale, key, residual=self._residual)

    def confirm_perturbed(
        self, outcome: Header | None, weight: Tensor, row_scale: Tensor, key: Tensor
    ) -> None:
        """Where the pool was too small, perturb once more with a larger one."""
        if outcome is None:
            return
        if not outcome.clean:
            raise_for("perturb_", outcome)
            return
        ops.restore_(weight, row_scale, key, residual=self._residual)
        with torch.inference_mode(False):
            self._residual = ops.new_residual(weight, int(4 * outcome.asked * _SPARE))
        ops.perturb_(weight, row_scale, key, residual=self._residual)
        ops.check_residual(self._residual)

    def restore(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> None:
        """Decode in place."""
        # CUDA kernels see by themselves that nothing is left to do: no copy to the host.
        if in_kernels(weight) or is_filled(self._residual):
            ops.restore_(weight, row_scale, key, residual=self._residual)

    def confirm_restored(self, outcome: Header | None) -> None:
        """Empty, if only because an interrupted close had come as far."""
        if outcome is not None and outcome.state == FILLED:
            raise_for("restore_", outcome)

    def clean(self, weight: Tensor, row_scale: Tensor, key: Tensor) -> Tensor:
        """Decode a copy."""
        copy, residual = weight.clone(), self._residual.clone()
        if is_filled(residual):
            ops.restore_(copy, row_scale, key, residual=residual)
        return copy

    def nbytes(self) -> int:
        """Header, directory and pool, once a window was open."""
        return 0 if self._residual is None else self._residual.nbytes


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def read_outcomes(keepers: list[Keeper]) -> list[Header | None]:
    """What became of the last calls: one copy to the host for each device, all keepers together.

    None for a snapshot, and for everything while a CUDA graph is captured.
    """
    outcomes: list[Header | None] = [None] * len(keepers)
    places: dict[torch.device, list[int]] = {}
    for place, keeper in enumerate(keepers):
        residual = keeper._residual if isinstance(keeper, Residual) else None
        if residual is not None and not _is_capturing(residual):
            places.setdefault(residual.device, []).append(place)
    for here in places.values():
        headers = read_all([keepers[place]._residual for place in here])
        for place, header in zip(here, headers, strict=True):
            outcomes[place] = header
    return outcomes


def keeper_of(restore: str | None, weight: Tensor, before: Keeper | None = None) -> Keeper:
    """The keeper that `WeightNoise(restore=...)` names: `before`, if that is one of its kind.

    None takes a residual where the backend has kernels for it. The reference, which takes
    full-size temporaries anyway, takes a snapshot.
    """
    if restore == "residual" or (restore is None and is_available(weight, native=True)):
        return before if isinstance(before, Residual) else Residual()
    return before if isinstance(before, Snapshot) else Snapshot(host=restore == "host")
