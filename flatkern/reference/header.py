"""The residual's header: what it was filled for, and why a call that differs writes nothing.

The C++ kernels keep it themselves (csrc/residual.h); here is what the reference does, and how
`flatkern.ops` reads what any implementation left.
"""

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatkern._noise import Noise
from flatkern._version import NOISE_VERSION, __version__
from flatkern.reference.residual import Layout

EMPTY, FILLED = 0, 1
# The bits of `refused`, lowest first; csrc/residual.h has the same.
REFUSALS = (
    *("bytes", "weight", "filled", "empty"),
    *("implementation", "elementwise", "row_offset", "col_offset"),
    *("seed", "step", "draw", "tensor", "row_scale"),
)

_MAGIC = b"FKR1"
_VERSION = 1
_FIELDS = struct.Struct("<4sHBBQQQQ4IQQQQIIII")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
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
    refused: int = 0  # why the last call wrote nothing, bits of REFUSALS

    @property
    def is_one(self) -> bool:
        """Whether these were the bytes of a residual."""
        return (self.magic, self.version) == (_MAGIC, _VERSION)

    @property
    def made_for(self) -> str:
        """What a residual is made for."""
        dtype = str(_DTYPES[self.dtype]).removeprefix("torch.")
        return f"{dtype} [{self.rows}, {self.cols}] with {self.capacity} words"


def layout_of(weight: Tensor) -> Layout:
    """The chunks of a weight of any shape, seen as dim0 x rest."""
    rows = weight.shape[0]
    cols = weight.numel() // rows if rows else 0
    return Layout(rows, cols, weight.element_size())


def new_header(weight: Tensor, pool_words: int) -> Header:
    """Of an empty residual."""
    layout = layout_of(weight)
    dtype = _DTYPES.index(weight.dtype)
    return Header(_MAGIC, _VERSION, dtype, 0, layout.rows, layout.cols, capacity=pool_words)


def read(residual: Tensor) -> Header:
    """The header of a residual; synchronises where it is on a GPU."""
    return read_all([residual])[0]


def read_all(residuals: Sequence[Tensor]) -> list[Header]:
    """The headers of residuals on one device, with one copy to the host."""
    size = _FIELDS.size
    data = bytes(torch.cat([residual[:size] for residual in residuals]).tolist())
    return [Header(*values) for values in _FIELDS.iter_unpack(data)]


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


def admits(residual: Tensor, weight: Tensor, noise: Noise, *, restore: bool) -> bool:
    """Whether the residual allows a perturbation or a restore; if not, it says why."""
    then = read(residual)
    refused = _refusal(_header_of(residual, weight, noise), then, restore)
    # Other bytes are not ours to write.
    if refused > 1:
        write(residual, replace(then, refused=refused))
    return not refused


def begin_perturb(residual: Tensor, weight: Tensor, noise: Noise) -> None:
    """Note a perturbation that was admitted, before the weight is written.

    Interrupted here, a restore finds every chunk clean, as when the residual was empty.
    """
    write(residual, _header_of(residual, weight, noise))


def finish_restore(residual: Tensor) -> None:
    """Empty again, unless chunks were left out."""
    header = read(residual)
    write(residual, replace(header, state=FILLED if header.mismatched else EMPTY, refused=0))


def _header_of(residual: Tensor, weight: Tensor, noise: Noise) -> Header:
    """What a perturbation leaves, before its chunks count."""
    words = (residual.numel() - layout_of(weight).pool_begin) // 4
    seed, step, draw, tensor = (word & 0xFFFFFFFF for word in noise.key.tolist())
    # A device that flushes denormals makes other noise.
    flushes = not torch.full((1,), 1e-39, device="cpu").mul_(0.5).any()
    return replace(
        new_header(weight, words),
        elementwise=int(noise.elementwise),
        row_offset=noise.row_offset,
        col_offset=noise.col_offset,
        seed=seed,
        step=step,
        draw=draw,
        tensor=tensor,
        implementation=_implementation(weight.device.type, bool(flushes)),
        row_scale=_digest(noise.row_scale),
        state=FILLED,
    )


def _refusal(now: Header, then: Header, restore: bool) -> int:
    def bits(*names: str) -> int:
        return sum(1 << REFUSALS.index(name) for name in names)

    if not then.is_one:
        return bits("bytes")
    own = ("dtype", "rows", "cols", "capacity")
    if any(getattr(now, name) != getattr(then, name) for name in own):
        return bits("weight")
    if not restore:
        return bits("filled") if then.state != EMPTY else 0
    if then.state != FILLED:
        return bits("empty")
    call = REFUSALS[REFUSALS.index("implementation") :]
    return bits(*(name for name in call if getattr(now, name) != getattr(then, name)))


def _digest(row_scale: Tensor) -> int:
    """A sum over the row scale's bits, each mixed with its position, modulo 2^64."""
    bits = row_scale.detach().contiguous().view(torch.int32).to(torch.int64)
    x = torch.arange(1, len(bits) + 1, device=bits.device).mul_(0x1E3779B97F4A7C15)
    x += bits
    x *= 0x3F58476D1CE4E5B9
    x ^= x >> 31
    return int(x.sum()) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF


@functools.cache
def _implementation(device_type: str, flushes: bool) -> int:
    """A hash of all that may move a bit of the noise or of the brackets."""
    device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    parts = ("reference", __version__, torch.__version__, NOISE_VERSION, device, flushes)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
