"""How the clean bits of a weight are kept while noise is written in it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatkern import ops
from flatkern._noise import Noise
from flatkern.noise.rows import Rows
from flatkern.ops._residual import EMPTY, FILLED, Header, all_done, header_of, raise_for, read_all
from flatkern.ops.residual import is_available, is_filled, pool_need

RESTORES = ("residual", "snapshot", "host")
# Times the pool that a window was measured to need, and what chance may add to a small one.
_SPARE = 1.1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Keeper:
    """Keeps one weight's clean bits, from `prepare` to `restore`, window after window.

    What is done to many weights is done in a few calls: they take keepers of one class, device and
    form of noise, each bound to a weight. Every method may be interrupted and called again.

    Attributes:
        survives_casts: whether `restore` also serves a weight that was cast or moved since.
        weight: where it lies, as dim0 x rest; of a sharded one this rank's part.
        noise: that of the window.
        largest_scale: makes the row scale of a window with the largest noise.
    """

    survives_casts = True
    weight: Tensor
    noise: Noise
    largest_scale: Callable[[], Tensor]

    def bind(self, weight: Tensor, noise: Noise, largest_scale: Callable[[], Tensor]) -> None:
        """Keep the bits of this weight from now on; its values need not be in it yet."""
        self.weight, self.noise, self.largest_scale = weight, noise, largest_scale

    @staticmethod
    def prepare(keepers: list[Any]) -> None:
        """Take the room that windows with a row scale up to `largest_scale()` need."""

    @staticmethod
    def perturb(keepers: list[Any]) -> None:
        """Write the noise, into one weight after the other where they overlap."""

    @staticmethod
    def seal(keepers: list[Any]) -> None:
        """Note what stands in the weights now that all of them are written."""

    @staticmethod
    def written(keepers: list[Any]) -> list[bool]:
        """Whether each weight is known to be neither what `seal` saw nor clean."""
        return [False] * len(keepers)

    @staticmethod
    def restore(keepers: list[Any]) -> None:
        """Bring back the clean bits, in the reverse order; nothing is done where they are there.

        RuntimeError for what `written` does not know beforehand; all other weights are restored.
        """

    def clean(self) -> Tensor:
        """A copy of the clean weight."""

    def nbytes(self) -> int:
        """Bytes that are held."""


class Snapshot(Keeper):
    """A copy of the weight, on its device or in host memory."""

    def __init__(self, host: bool) -> None:
        """Host memory is pinned where the weight is on a GPU."""
        self._host = host
        self._copy: Tensor | None = None
        # Of the noisy weight: its dtype, and `checksums`; None while nothing is known.
        self._seal: tuple[torch.dtype, Tensor] | None = None

    @staticmethod
    def prepare(keepers: list[Any]) -> None:
        """Copy the weights."""
        weights = [one.weight for one in keepers]
        torch._foreach_copy_([one._room() for one in keepers], weights)

    def _room(self) -> Tensor:
        weight, copy = self.weight, self._copy
        device = torch.device("cpu") if self._host else weight.device
        like = (weight.shape, weight.dtype, device)
        if copy is None or (copy.shape, copy.dtype, copy.device) != like:
            pinned = self._host and weight.is_cuda
            with torch.inference_mode(False):
                self._copy = torch.empty_like(weight, device=device, pin_memory=pinned)
        return self._copy

    @staticmethod
    def perturb(keepers: list[Any]) -> None:
        """Write the noise."""
        _call(ops.foreach_perturb_, keepers)

    @staticmethod
    def seal(keepers: list[Any]) -> None:
        """Take sums of the bits; a CUDA graph that is being captured could not compare them."""
        for one in keepers:
            known = None if _is_capturing(one.weight) else (one.weight.dtype, checksums(one.weight))
            one._seal = known

    @staticmethod
    def written(keepers: list[Any]) -> list[bool]:
        """Compare the sums, waiting once for each device; only where they differ, all bits."""
        found = [False] * len(keepers)
        pairs: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = {}
        for i, one in enumerate(keepers):
            seal, weight = one._seal, one.weight
            if seal is None or _is_capturing(weight):
                continue
            dtype, before = seal
            now = checksums(weight) if weight.dtype == dtype else None
            if now is None or now.shape != before.shape:
                found[i] = one._was_written()
            else:
                pairs.setdefault(weight.device, []).append((i, before.to(weight.device), now))
        for found_here in pairs.values():
            before, now = (torch.cat(sums) for sums in list(zip(*found_here, strict=True))[1:])
            if not torch.equal(before, now):
                for i, own, other in found_here:
                    if not torch.equal(own, other):
                        found[i] = keepers[i]._was_written()
        return found

    def _was_written(self) -> bool:
        """Whether the weight is neither clean nor noisy, by making the noise once more.

        It may have been cast or moved, or be clean already after an interruption.
        """
        weight = self.weight
        if weight.shape != self._copy.shape:
            return True
        clean = self._copy.to(self.noise.row_scale.device, copy=True)
        if _same_bits(clean.to(weight.device, weight.dtype), weight):
            return False
        self._add_noise(clean)
        return not _same_bits(clean.to(weight.device, weight.dtype), weight)

    def _add_noise(self, weight: Tensor) -> None:
        ops.perturb_(weight, *self.noise.tensors, **self.noise.options)

    @staticmethod
    def restore(keepers: list[Any]) -> None:
        """Copy back."""
        torch._foreach_copy_([one.weight for one in keepers], [one._copy for one in keepers])

    def clean(self) -> Tensor:
        """A copy of the copy; the module may have been cast or moved inside the window."""
        return self._copy.to(self.weight.device, self.weight.dtype, copy=True)

    def nbytes(self) -> int:
        """The weight's size, once a window was open."""
        return 0 if self._copy is None else self._copy.nbytes


class ColumnSnapshot(Snapshot):
    """A copy of a weight whose rows are columns, which kernels have no scales for."""

    def __init__(self, host: bool, rows: Rows) -> None:
        """See `Snapshot`; `rows` says which columns belong together."""
        super().__init__(host)
        self._rows = rows

    @staticmethod
    def perturb(keepers: list[Any]) -> None:
        """Write the noise."""
        for one in keepers:
            one._add_noise(one.weight)

    def _add_noise(self, weight: Tensor) -> None:
        """In panels of bounded size; element by element as the kernels do."""
        row_scale, key = self.noise.tensors
        options = {"elementwise": self.noise.elementwise}
        self._rows.perturb_columns_(weight, [(row_scale, key)], **options)


class Residual(Keeper):
    """What the noise takes from the weight, and no more: see `flatkern.ops.new_residual`."""

    survives_casts = False

    def __init__(self) -> None:
        """Nothing is allocated before the first window."""
        self._residual: Tensor | None = None
        self._like: tuple | None = None
        # For the weight that this is bound to.
        self._prepared = False
        # The residual and a view of its header.
        self._viewed: tuple[Tensor | None, Tensor | None] = None, None

    def bind(self, weight: Tensor, noise: Noise, largest_scale: Callable[[], Tensor]) -> None:
        """As in `Keeper`; another weight may need another residual."""
        super().bind(weight, noise, largest_scale)
        self._prepared = False

    def header(self) -> Tensor:
        """A view of the residual's first bytes, made once."""
        if self._viewed[0] is not self._residual:
            self._viewed = self._residual, header_of(self._residual)
        return self._viewed[1]

    @staticmethod
    def prepare(keepers: list[Any]) -> None:
        """Size the pools by a perturbation without one, which counts and writes no weight."""
        for one in keepers:
            one._prepare()

    def _prepare(self) -> None:
        weight, capturing = self.weight, _is_capturing(self.weight)
        if self._prepared and not capturing:
            return
        like = (weight.shape, weight.dtype, weight.device)
        if self._like in ((*like, capturing), (*like, True)):
            self._prepared = True
            return
        with torch.inference_mode(False):
            # A CUDA graph that is being captured cannot count or grow: it takes the worst case.
            pool_bytes = None
            if not capturing:
                counter = ops.new_residual(weight, 0)
                largest = self.noise._replace(row_scale=self.largest_scale())
                ops.perturb_(weight, *largest.tensors, **largest.options, residual=counter)
                pool_bytes = _room_for(pool_need(counter)[0] // 4)
            self._residual = ops.new_residual(weight, pool_bytes)
        self._like = (*like, capturing)

    @staticmethod
    def perturb(keepers: list[Any]) -> None:
        """Write the noise; where a pool is too small, once more with a larger one."""
        _call(ops.foreach_perturb_, keepers, with_residuals=True)
        if _all_done(keepers, FILLED):
            return
        again, storages = [], set()
        for one, header in zip(keepers, _headers(keepers), strict=True):
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
                    one._residual = ops.new_residual(one.weight, pool_bytes)
        _call(ops.foreach_perturb_, redone, with_residuals=True)
        for header in _headers(redone):
            if header is not None:
                raise_for("perturb_", header)

    @staticmethod
    def restore(keepers: list[Any]) -> None:
        """Decode in place; a check word for each chunk says whether something else wrote there."""
        filled = keepers[::-1]
        for _ in range(2):
            _call(ops.foreach_restore_, filled, with_residuals=True)
            if _all_done(filled, EMPTY):
                return
            # Interrupted before, some are restored or were never perturbed. Where the kernels do
            # not skip these by themselves, they have refused the others with them.
            pairs = zip(filled, _headers(filled), strict=True)
            left = [(one, header) for one, header in pairs if header and header.state == FILLED]
            filled = [one for one, _ in left]
        for _, header in left:
            raise_for("restore_", header)

    def clean(self) -> Tensor:
        """Decode a copy."""
        copy, residual = self.weight.clone(), self._residual.clone()
        if is_filled(residual):
            ops.restore_(copy, *self.noise.tensors, residual=residual, **self.noise.options)
        return copy

    def nbytes(self) -> int:
        """Header, directory and pool, once a window was open."""
        return 0 if self._residual is None else self._residual.nbytes


def _room_for(words: int) -> int:
    """Bytes of a pool for windows like one that asked for so many words.

    What another key asks for differs by chance, by about 0.4 times the square root.
    """
    return int(4 * _SPARE * (words + 4 * math.sqrt(words)))


def _call(op: Callable[..., None], keepers: list[Any], with_residuals: bool = False) -> None:
    """An op of `flatkern.ops.foreach` on all weights, with their noise."""
    noises = [one.noise for one in keepers]
    op(
        [one.weight for one in keepers],
        [noise.row_scale for noise in noises],
        [noise.key for noise in noises],
        elementwise=bool(noises) and noises[0].elementwise,
        row_offsets=[noise.row_offset for noise in noises],
        col_offsets=[noise.col_offset for noise in noises],
        residuals=[one._residual for one in keepers] if with_residuals else None,
        checked=True,
    )


def _headers(keepers: list[Residual]) -> list[Header | None]:
    """With one copy to the host for each device; None where a CUDA graph is being captured."""
    headers: list[Header | None] = [None] * len(keepers)
    readable = [i for i, one in enumerate(keepers) if not _is_capturing(one.weight)]
    for device in {keepers[i].weight.device for i in readable}:
        here = [i for i in readable if keepers[i].weight.device == device]
        found = read_all([keepers[i]._residual for i in here])
        for i, header in zip(here, found, strict=True):
            headers[i] = header
    return headers


def _all_done(keepers: list[Residual], state: int) -> bool:
    """Whether every residual says that all of its weight is done, with one copy to the host.

    One whose kernels a CUDA graph only records says nothing.
    """
    headers = [one.header() for one in keepers if not _is_capturing(one.weight)]
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
    host = restore == "host"
    if rows.columns:
        return before if isinstance(before, ColumnSnapshot) else ColumnSnapshot(host, rows)
    if restore == "residual" or (restore is None and is_available(weight, native=True)):
        return before if isinstance(before, Residual) else Residual()
    return before if type(before) is Snapshot else Snapshot(host)
