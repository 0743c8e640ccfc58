"""How the clean bits of a weight are kept while noise is written in it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flatkern import ops
from flatkern.noise.rows import Rows
from flatkern.ops._residual import EMPTY, FILLED, Header, all_done, header_of, raise_for, read_all
from flatkern.ops.residual import is_available, is_filled, pool_need

# Times the pool that a window was measured to need, and what chance may add to a small one.
_SPARE = 1.1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept(NamedTuple):
    """A weight in a window, with what its noise is made from and what keeps its clean bits."""

    keeper: "Keeper"
    weight: Tensor
    row_scale: Tensor
    key: Tensor
    # The row scale of a window with the largest noise.
    largest_scale: Callable[[], Tensor]
    # The same for all that are done in one call.
    elementwise: bool
    # Where a shard begins in the whole weight.
    row_offset: int = 0
    col_offset: int = 0
    # None: those of dim0 x rest.
    rows: Rows | None = None


class Keeper(Protocol):
    """Keeps one weight's clean bits, from `prepare` to `restore`, window after window.

    What is done to many weights is done in a few calls: `kept` are those of one kind of keeper.
    Every method may be interrupted and called again.
    """

    # Whether `restore` also serves a weight that was cast or moved since.
    survives_casts: bool

    @staticmethod
    def prepare(kept: list[Kept]) -> None:
        """Take the room that windows with a row scale up to `largest_scale()` need."""

    @staticmethod
    def perturb(kept: list[Kept]) -> None:
        """Write the noise, into one weight after the other where they overlap."""

    @staticmethod
    def seal(kept: list[Kept]) -> None:
        """Note what stands in the weights now that all of them are written."""

    @staticmethod
    def written(kept: list[Kept]) -> list[bool]:
        """Whether each weight is known to be neither what `seal` saw nor clean."""

    @staticmethod
    def restore(kept: list[Kept]) -> None:
        """Bring back the clean bits, in the reverse order; nothing is done where they are there.

        RuntimeError for what `written` does not know beforehand; all other weights are restored.
        """

    def clean(self, one: Kept) -> Tensor:
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
        # Of the noisy weight: its dtype, and `checksums`; None while nothing is known.
        self._seal: tuple[torch.dtype, Tensor] | None = None

    @staticmethod
    def prepare(kept: list[Kept]) -> None:
        """Copy the weights."""
        weights = [one.weight for one in kept]
        torch._foreach_copy_([one.keeper._room(one.weight) for one in kept], weights)

    def _room(self, weight: Tensor) -> Tensor:
        device = torch.device("cpu") if self._host else weight.device
        like = (weight.shape, weight.dtype, device)
        kept = self._copy
        if kept is None or (kept.shape, kept.dtype, kept.device) != like:
            with torch.inference_mode(False):
                self._copy = self._allocate(weight)
        return self._copy

    def _allocate(self, weight: Tensor) -> Tensor:
        if not self._host:
            return torch.empty_like(weight)
        return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)

    @staticmethod
    def perturb(kept: list[Kept]) -> None:
        """Write the noise."""
        ops.foreach_perturb_(*_operands(kept), **_options(kept))

    @staticmethod
    def seal(kept: list[Kept]) -> None:
        """Take sums of the bits; a CUDA graph that is being captured could not compare them."""
        for one in kept:
            known = None if _is_capturing(one.weight) else (one.weight.dtype, checksums(one.weight))
            one.keeper._seal = known

    @staticmethod
    def written(kept: list[Kept]) -> list[bool]:
        """Compare the sums, waiting once for each device; only where they differ, all bits."""
        found = [False] * len(kept)
        pairs: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = {}
        for i, one in enumerate(kept):
            seal, weight = one.keeper._seal, one.weight
            if seal is None or _is_capturing(weight):
                continue
            dtype, before = seal
            now = checksums(weight) if weight.dtype == dtype else None
            if now is None or now.shape != before.shape:
                found[i] = one.keeper._was_written(one)
            else:
                pairs.setdefault(weight.device, []).append((i, before.to(weight.device), now))
        for found_here in pairs.values():
            before, now = (torch.cat(sums) for sums in list(zip(*found_here, strict=True))[1:])
            if not torch.equal(before, now):
                for i, own, other in found_here:
                    if not torch.equal(own, other):
                        found[i] = kept[i].keeper._was_written(kept[i])
        return found

    def _was_written(self, one: Kept) -> bool:
        """Whether the weight is neither clean nor noisy, by making the noise once more.

        It may have been cast or moved, or be clean already after an interruption.
        """
        weight = one.weight
        if weight.shape != self._copy.shape:
            return True
        clean = self._copy.to(one.row_scale.device, copy=True)
        if _same_bits(clean.to(weight.device, weight.dtype), weight):
            return False
        type(self).perturb([one._replace(weight=clean)])
        return not _same_bits(clean.to(weight.device, weight.dtype), weight)

    @staticmethod
    def restore(kept: list[Kept]) -> None:
        """Copy back."""
        torch._foreach_copy_([one.weight for one in kept], [one.keeper._copy for one in kept])

    def clean(self, one: Kept) -> Tensor:
        """A copy of the copy; the module may have been cast or moved inside the window."""
        return self._copy.to(one.weight.device, one.weight.dtype, copy=True)

    def nbytes(self) -> int:
        """The weight's size, once a window was open."""
        return 0 if self._copy is None else self._copy.nbytes


class ColumnSnapshot(Snapshot):
    """A copy of a weight whose rows are columns, which kernels have no scales for."""

    @staticmethod
    def perturb(kept: list[Kept]) -> None:
        """Write the noise, in panels of bounded size."""
        for one in kept:
            matrix = one.weight.reshape(one.weight.shape[0], -1)
            options = {"elementwise": one.elementwise}
            one.rows.perturb_columns_(matrix, one.row_scale, one.key, **options)


class Residual:
    """What the noise takes from the weight, and no more: see `flatkern.ops.new_residual`."""

    survives_casts = False

    def __init__(self) -> None:
        """Nothing is allocated before the first window."""
        self._residual: Tensor | None = None
        self._like: tuple | None = None
        self._prepared: Kept | None = None
        # The residual and a view of its header.
        self._viewed: tuple[Tensor | None, Tensor | None] = None, None

    def header(self) -> Tensor:
        """A view of the residual's first bytes, made once."""
        if self._viewed[0] is not self._residual:
            self._viewed = self._residual, header_of(self._residual)
        return self._viewed[1]

    @staticmethod
    def prepare(kept: list[Kept]) -> None:
        """Size the pools by a perturbation without one, which counts and writes no weight."""
        for one in kept:
            one.keeper._prepare(one)

    def _prepare(self, one: Kept) -> None:
        weight, capturing = one.weight, _is_capturing(one.weight)
        if one is self._prepared and not capturing:
            return
        like = (weight.shape, weight.dtype, weight.device)
        if self._like in ((*like, capturing), (*like, True)):
            self._prepared = one
            return
        with torch.inference_mode(False):
            # A CUDA graph that is being captured cannot count or grow: it takes the worst case.
            pool_bytes = None
            if not capturing:
                counter = ops.new_residual(weight, 0)
                options = {"residual": counter, **_single(one)}
                ops.perturb_(weight, one.largest_scale(), one.key, **options)
                pool_bytes = _room_for(pool_need(counter)[0] // 4)
            self._residual = ops.new_residual(weight, pool_bytes)
        self._like = (*like, capturing)

    @staticmethod
    def perturb(kept: list[Kept]) -> None:
        """Write the noise; where a pool is too small, once more with a larger one."""
        ops.foreach_perturb_(*_operands(kept), **_options(kept), residuals=_residuals(kept))
        if _all_done(kept, FILLED):
            return
        again, storages = [], set()
        for one, header in zip(kept, _headers(kept), strict=True):
            storage = one.weight.untyped_storage().data_ptr()
            short = header is not None and header.clean and not header.refused
            if header is not None and not short:
                raise_for("perturb_", header)
            # Those behind it in its memory as well: they may overlap it.
            if short or storage in storages:
                again.append((one, header))
                storages.add(storage)
        if not again:
            return
        redone = [one for one, _ in again]
        Residual.restore(redone)
        for one, header in again:
            if header is not None and header.clean:
                with torch.inference_mode(False):
                    pool_bytes = _room_for(header.asked)
                    one.keeper._residual = ops.new_residual(one.weight, pool_bytes)
        ops.foreach_perturb_(*_operands(redone), **_options(redone), residuals=_residuals(redone))
        for header in _headers(redone):
            if header is not None:
                raise_for("perturb_", header)

    @staticmethod
    def seal(kept: list[Kept]) -> None:
        """The residual has a check word for each chunk of its weight."""

    @staticmethod
    def written(kept: list[Kept]) -> list[bool]:
        """`restore` finds out."""
        return [False] * len(kept)

    @staticmethod
    def restore(kept: list[Kept]) -> None:
        """Decode in place."""
        filled = kept[::-1]
        for _ in range(2):
            ops.foreach_restore_(
                *_operands(filled), **_options(filled), residuals=_residuals(filled)
            )
            if _all_done(filled, EMPTY):
                return
            # Interrupted before, some are restored or were never perturbed. Where the kernels do
            # not skip these by themselves, they have refused the others with them.
            pairs = zip(filled, _headers(filled), strict=True)
            left = [(one, header) for one, header in pairs if header and header.state == FILLED]
            filled = [one for one, _ in left]
        for _, header in left:
            raise_for("restore_", header)

    def clean(self, one: Kept) -> Tensor:
        """Decode a copy."""
        copy, residual = one.weight.clone(), self._residual.clone()
        if is_filled(residual):
            ops.restore_(copy, one.row_scale, one.key, residual=residual, **_single(one))
        return copy

    def nbytes(self) -> int:
        """Header, directory and pool, once a window was open."""
        return 0 if self._residual is None else self._residual.nbytes


def _room_for(words: int) -> int:
    """Bytes of a pool for windows like one that asked for so many words.

    What another key asks for differs by chance, by about 0.4 times the square root.
    """
    return int(4 * _SPARE * (words + 4 * math.sqrt(words)))


def _operands(kept: list[Kept]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, row scales and keys."""
    return [one.weight for one in kept], [one.row_scale for one in kept], [one.key for one in kept]


def _options(kept: list[Kept]) -> dict[str, Any]:
    return {
        "elementwise": kept[0].elementwise if kept else False,
        "row_offsets": [one.row_offset for one in kept],
        "col_offsets": [one.col_offset for one in kept],
        "checked": True,
    }


def _single(one: Kept) -> dict[str, Any]:
    names = ("elementwise", "row_offset", "col_offset")
    return {name: getattr(one, name) for name in names}


def _residuals(kept: list[Kept]) -> list[Tensor]:
    return [one.keeper._residual for one in kept]


def _headers(kept: list[Kept]) -> list[Header | None]:
    """With one copy to the host for each device; None where a CUDA graph is being captured."""
    headers: list[Header | None] = [None] * len(kept)
    readable = [i for i, one in enumerate(kept) if not _is_capturing(one.weight)]
    for device in {kept[i].weight.device for i in readable}:
        here = [i for i in readable if kept[i].weight.device == device]
        found = read_all([kept[i].keeper._residual for i in here])
        for i, header in zip(here, found, strict=True):
            headers[i] = header
    return headers


def _all_done(kept: list[Kept], state: int) -> bool:
    """Whether every residual says that all of its weight is done, with one copy to the host.

    One whose kernels a CUDA graph only records says nothing.
    """
    headers = [one.keeper.header() for one in kept if not _is_capturing(one.weight)]
    return all_done(headers, state)


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def checksums(weight: Tensor) -> Tensor:
    """The sum of the bits of each row of dim0 x rest, as int64 modulo 2^64."""
    bits = weight.view(_INTEGERS[weight.dtype.itemsize])
    words = bits.reshape(bits.shape[0], bits.shape[1:].numel())
    row_bytes, offset = words.shape[1] * words.dtype.itemsize, words.storage_offset()
    if words.is_contiguous() and row_bytes % 8 == 0 == offset * words.dtype.itemsize % 8:
        words = words.view(torch.int64)
    return words.sum(1, dtype=torch.int64)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = _INTEGERS[one.dtype.itemsize]
    return torch.equal(one.view(integers), other.view(integers))


def keeper_of(
    restore: str | None, weight: Tensor, rows: Rows, before: Keeper | None = None
) -> Keeper:
    """The keeper that `WeightNoise(restore=...)` names: `before`, if that is one of its kind.

    None takes a residual where the backend has kernels for it. The reference, which takes
    full-size temporaries anyway, takes a snapshot.
    """
    if rows.columns:
        return before if isinstance(before, ColumnSnapshot) else ColumnSnapshot(restore == "host")
    if restore == "residual" or (restore is None and is_available(weight, native=True)):
        return before if isinstance(before, Residual) else Residual()
    return before if type(before) is Snapshot else Snapshot(host=restore == "host")
