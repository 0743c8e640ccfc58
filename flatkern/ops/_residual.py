"""The residual's header: what a residual was filled for, and the refusals.

Shape, dtype, key, offsets, row scale and implementation are compared before anything is written:
here, or by the CUDA kernels, which keep the header themselves so that no call waits for a copy to
the host. The implementations compare each chunk with its check word.
"""

import functools
import hashlib
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatkern import _backend
from flatkern._version import __version__
from flatkern.ops import _check
from flatkern.reference.residual import Layout

# The other backends refuse a residual.
BACKENDS = ("cpu", "cuda", "reference")
EMPTY, FILLED = 0, 1
# The bits of `refused`, lowest first; csrc/residual.h has the same.
_STATES = {
    "bytes": "is not what new_residual returns",
    "weight": "was made for a weight of another shape or dtype",
    "filled": "was filled by an earlier perturb_ that was not restored; restore_ the weight first",
    "empty": "is empty: nothing was perturbed with it since the last restore_",
}
REFUSALS = (
    *_STATES,
    *("implementation", "elementwise", "row_offset", "col_offset"),
    *("seed", "step", "draw", "tensor", "row_scale"),
)

_MAGIC = b"FKR1"
_VERSION = 1
_NOISE_VERSION = 1
_FIELDS = struct.Struct("<4sHBBQQQQ4IQQQQIIII")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALIGNMENT = 16


@dataclass
class Header:
    """The first bytes of a residual, little-endian, in this order."""

    magic: bytes
    version: int
    dtype: int
    elementwise: int
    rows: int
    cols: int
    row_offset: int = 0
    col_offset: int = 0
    seed: int = 0
    step: int = 0
    draw: int = 0
    tensor: int = 0
    implementation: int = 0
    row_scale: int = 0  # a digest of its bits
    capacity: int = 0  # words of the pool
    asked: int = 0  # words that chunks asked for, refused ones included
    clean: int = 0  # chunks that found no room and were not perturbed
    state: int = EMPTY
    mismatched: int = 0  # chunks that the last restore refused
    refused: int = 0  # CUDA: why the last call wrote nothing, bits of REFUSALS


def layout_of(weight: Tensor) -> Layout:
    """The chunks of a weight that passed `_check.weight`."""
    rows = weight.shape[0]
    cols = weight.numel() // rows if rows else 0
    return Layout(rows, cols, weight.element_size())


def new_header(weight: Tensor, pool_words: int) -> Header:
    """Of an empty residual."""
    layout = layout_of(weight)
    dtype = _DTYPES.index(weight.dtype)
    return Header(_MAGIC, _VERSION, dtype, 0, layout.rows, layout.cols, capacity=pool_words)


def read(residual: Tensor) -> Header:
    """The header of what passed `check`; synchronises where the residual is on a GPU."""
    return read_all([residual])[0]


def read_all(residuals: list[Tensor]) -> list[Header]:
    """The headers of residuals on one device, with one copy to the host."""
    stacked = torch.stack([residual[: _FIELDS.size] for residual in residuals])
    return [Header(*_FIELDS.unpack(bytes(row))) for row in stacked.tolist()]


def create(residual: Tensor, header: Header) -> None:
    """Write a header into zeros, by fills: nothing synchronises or is copied from the host."""
    data = _FIELDS.pack(*vars(header).values())
    words = residual[: len(data)].view(torch.int32)
    for index, (value,) in enumerate(struct.iter_unpack("<i", data)):
        if value:
            words[index : index + 1].fill_(value)


def write(residual: Tensor, header: Header) -> None:
    """Overwrite the header."""
    data = bytearray(_FIELDS.pack(*vars(header).values()))
    residual[: _FIELDS.size] = torch.frombuffer(data, dtype=torch.uint8)


def check(op: str, residual: Tensor | None, weight: Tensor) -> None:
    """What can be said without the content: dtype, shape, device, size. None passes."""
    if residual is None:
        return
    least = layout_of(weight).pool_begin
    accepted = f"what new_residual(weight) returns: uint8 [{least} or more] on {weight.device}"
    if (
        residual.dtype != torch.uint8
        or residual.dim() != 1
        or not residual.is_contiguous()
        or residual.device != weight.device
        or residual.shape[0] < least
    ):
        _check.refuse(op, "residual", accepted, residual)


def check_backend(op: str, weight: Tensor) -> None:
    """Refuse a residual where the backend that serves the weight has none."""
    name = _backend.resolve(weight.device.type, weight.dtype)
    if name not in BACKENDS:
        raise ValueError(
            f"{op}: residual must be None on backend {name!r}; the backends with an exact "
            f"residual are {', '.join(BACKENDS[:-1])} and {BACKENDS[-1]}"
        )


def in_kernels(weight: Tensor) -> bool:
    """Whether the kernels keep the header; then refusals are left there for `require_done`."""
    return _backend.resolve(weight.device.type, weight.dtype) == "cuda"


def begin_perturb(
    op: str,
    residual: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool,
    row_offset: int,
    col_offset: int,
) -> None:
    """Refuse a residual that is full; note what it is filled for, before the weight is written."""
    header = require_empty(op, residual, weight)
    if header is None:
        return
    header = _window(header, weight, row_scale, key, elementwise, row_offset, col_offset)
    # Before the weight is: interrupted here, a restore finds every chunk clean, as when empty.
    write(residual, replace(header, asked=0, clean=0, mismatched=0, state=FILLED))


def require_empty(op: str, residual: Tensor, weight: Tensor) -> Header | None:
    """Refuse a residual that is not this weight's, or holds what was not restored yet."""
    header = _own(op, residual, weight)
    if header is not None and header.state != EMPTY:
        raise RuntimeError(f"{op}: residual {_STATES['filled']}")
    return header


def begin_restore(
    op: str,
    residual: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool,
    row_offset: int,
    col_offset: int,
) -> None:
    """Refuse a residual that is empty, or was filled for anything else than this call."""
    header = _own(op, residual, weight)
    if header is None:
        return
    if header.state != FILLED:
        raise RuntimeError(f"{op}: residual {_STATES['empty']}")
    now = _window(header, weight, row_scale, key, elementwise, row_offset, col_offset)
    if now.implementation != header.implementation:
        raise RuntimeError(
            f"{op}: residual was filled by another backend, build or instruction set, whose noise "
            "may differ; restore under the one that perturbed"
        )
    different = [name for name, value in vars(now).items() if value != getattr(header, name)]
    if different:
        was = ", ".join(f"{name} {getattr(header, name)}" for name in different)
        got = ", ".join(f"{name} {getattr(now, name)}" for name in different)
        raise RuntimeError(f"{op}: residual was filled with {was}, got {got}; nothing was written")


def finish_restore(op: str, residual: Tensor, weight: Tensor) -> None:
    """Empty again, unless chunks were refused."""
    if in_kernels(weight):
        return
    header = read(residual)
    _require_match(op, header)
    write(residual, replace(header, state=EMPTY))


def require_done(op: str, residual: Tensor) -> None:
    """Refuse a perturbation or a restore that left chunks out."""
    raise_for(op, read(residual))


def raise_for(op: str, header: Header) -> None:
    """`require_done` of a header that was read."""
    _require_format(op, header)
    if header.refused:
        _raise_refusal(op, header.refused)
    _require_match(op, header)
    # Restored, nothing is missing any more.
    if header.clean and header.state == FILLED:
        raise RuntimeError(
            f"{op}: residual has no room for {header.clean} chunks, which were not perturbed: "
            f"they need pool_bytes={4 * header.asked}, it has {4 * header.capacity}"
        )


def _raise_refusal(op: str, refused: int) -> None:
    names = [name for bit, name in enumerate(REFUSALS) if refused >> bit & 1]
    if names[0] in _STATES:
        raise RuntimeError(f"{op}: residual {_STATES[names[0]]}; nothing was written")
    raise RuntimeError(
        f"{op}: residual was filled with {', '.join(names)} other than those of the last call; "
        "nothing was written"
    )


def _require_match(op: str, header: Header) -> None:
    if header.mismatched:
        raise RuntimeError(
            f"{op}: weight is not what perturb_ left: {header.mismatched} chunks of it differ from "
            "those that residual was filled for, and were left alone; all others are restored"
        )


def _require_format(op: str, header: Header) -> None:
    if header.magic != _MAGIC or header.version != _VERSION:
        raise ValueError(f"{op}: residual must be what new_residual returns, got other bytes")


def _own(op: str, residual: Tensor, weight: Tensor) -> Header | None:
    """The header, if it is one of this weight's shape and dtype; None where kernels keep it."""
    check_backend(op, weight)
    pool_bytes = residual.numel() - layout_of(weight).pool_begin
    aligned = residual.data_ptr() % _ALIGNMENT == 0 and pool_bytes % 4 == 0
    if in_kernels(weight):
        if not aligned:
            _check.refuse(op, "residual", "as new_residual returned it, not a part of it", residual)
        return None
    header = read(residual)
    _require_format(op, header)
    expected = new_header(weight, pool_bytes // 4)
    own = ("dtype", "rows", "cols", "capacity")
    if not aligned or any(getattr(header, name) != getattr(expected, name) for name in own):
        dtype = str(_DTYPES[header.dtype]).removeprefix("torch.")
        shape = f"{dtype} [{header.rows}, {header.cols}] with {header.capacity} words"
        raise ValueError(
            f"{op}: residual must be this weight's, {_check.describe(weight)}, "
            f"got {_check.describe(residual)} made for {shape}"
        )
    return header


def _window(header, weight, row_scale, key, elementwise, row_offset, col_offset) -> Header:
    seed, step, draw, tensor = (word & 0xFFFFFFFF for word in key.tolist())
    return replace(
        header,
        elementwise=int(elementwise),
        row_offset=row_offset,
        col_offset=col_offset,
        seed=seed,
        step=step,
        draw=draw,
        tensor=tensor,
        implementation=_implementation(weight),
        row_scale=_digest(row_scale),
    )


def _digest(row_scale: Tensor) -> int:
    """A sum over the row scale's bits, each mixed with its position, modulo 2^64."""
    bits = row_scale.detach().contiguous().view(torch.int32).to(torch.int64)
    x = torch.arange(1, len(bits) + 1, device=bits.device).mul_(0x1E3779B97F4A7C15)
    x += bits
    x *= 0x3F58476D1CE4E5B9
    x ^= x >> 31
    return int(x.sum()) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF


def _implementation(weight: Tensor) -> int:
    backend = _backend.resolve(weight.device.type, weight.dtype)
    # The reference flushes denormals where torch does.
    flushes = backend == "reference" and not torch.full((1,), 1e-39).mul_(0.5).any()
    return _identity(backend, weight.device.type, bool(flushes))


@functools.cache
def _identity(backend: str, device_type: str, flushes: bool) -> int:
    """A hash of all that may move a bit of the noise or of the brackets."""
    build = _backend.build_info()["extension"] if backend != "reference" else None
    device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    parts = (backend, __version__, torch.__version__, _NOISE_VERSION, device, flushes, build)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
