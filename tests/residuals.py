"""What the tests of the residual share: round trips, and a residual's content by its layout."""

import struct
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import tolerances
import torch

import flatkern
from flatkern.reference.residual import Layout

KEY = (3, 14, 15, 92)
CLEAN, PACKED, GRID, RAW = range(4)
HEADER = 128
MODE_NAMES = ("clean", "packed", "grid", "raw")


def make_key(device, key=KEY):
    return flatkern.NoiseKey(*key).to(device)


def gaussian(shape, dtype, device="cpu", seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * size).to(device, dtype)


def constant(weight, c):
    return torch.full((weight.shape[0],), c, device=weight.device)


@contextmanager
def refused(residual, match):
    """The call inside refuses; kernels of a GPU report to no host, so there the next check does."""
    with pytest.raises(RuntimeError, match=match) as raised:  # noqa: PT012
        yield raised
        if residual.is_cuda:
            flatkern.ops.check_residual(residual)


def word(residual, offset, kind="<I"):
    return struct.unpack_from(kind, residual.cpu().numpy().tobytes(), offset)[0]


@dataclass
class Content:
    """A residual, parsed."""

    asked: int  # words
    clean: int
    state: int
    mismatched: int
    capacity: int
    modes: list
    payloads: list  # lists of words; [] for clean chunks
    total_bits: float  # per element, directory and header included


def parse(residual, weight):
    rows = weight.shape[0]
    layout = Layout(rows, weight.numel() // max(rows, 1), weight.element_size())
    data = residual.cpu().numpy().tobytes()
    (capacity, asked) = struct.unpack_from("<QQ", data, 72)
    (clean, state, mismatched) = struct.unpack_from("<III", data, 88)
    begin = HEADER + -(-4 * layout.chunks // 16) * 16
    pool = struct.unpack_from(f"<{(len(data) - begin) // 4}I", data, begin)
    directory = struct.unpack_from(f"<{layout.chunks}I", data, HEADER)
    counts = layout.counts(torch.device("cpu")).tolist()
    entry = 2 if weight.dtype == torch.float32 else 1
    payloads = []
    for item, count in zip(directory, counts, strict=True):
        mode, offset = item & 3, item >> 2
        words = 0
        if mode == RAW:
            words = 1 + -(-count * weight.element_size() // 4)
        elif mode != CLEAN:
            low, listed = pool[offset] & 0xFFFF, pool[offset] >> 16
            words = 2 + (-(-low // 32) if mode == PACKED else 0) + entry * listed
        payloads.append(list(pool[offset : offset + words]))
        assert len(payloads[-1]) == words
    total = 8 * begin + 32 * asked
    return Content(
        *(asked, clean, state, mismatched, capacity),
        [item & 3 for item in directory],
        payloads,
        total / max(weight.numel(), 1),
    )


def modes(residual, weight):
    """How many chunks each mode has, by name."""
    found = parse(residual, weight).modes
    return {name: found.count(mode) for mode, name in enumerate(MODE_NAMES) if mode in found}


def listed(residual, weight):
    """Elements that packed and grid chunks list."""
    content = parse(residual, weight)
    short = zip(content.modes, content.payloads, strict=True)
    return sum(payload[0] >> 16 for mode, payload in short if mode in (PACKED, GRID))


def round_trip(weight, scale, key, *, pool_bytes=None, elementwise=False, **offsets):
    """Perturb a copy, compare with `perturb`, restore, compare every bit.

    Returns the copy of the residual as it was filled.
    """
    options = {"elementwise": elementwise, **offsets}
    work = weight.clone()
    residual = flatkern.ops.new_residual(weight, pool_bytes)
    flatkern.ops.perturb_(work, scale, key, residual=residual, **options)
    if pool_bytes is None:
        flatkern.ops.check_residual(residual)
        tolerances.assert_same_bits(work, flatkern.ops.perturb(weight, scale, key, **options))
    filled = residual.clone()
    flatkern.ops.restore_(work, scale, key, residual=residual, **options)
    tolerances.assert_same_bits(work, weight)
    return filled
