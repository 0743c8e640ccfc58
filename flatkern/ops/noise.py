"""Counter-based random words, normals and uniform values: `philox_bits`, `noise`, `uniform`.

Element (i, j) depends on (seed, step, draw, tensor, row_offset + i, col_offset + j) alone, so any
slice, shard, thread count or backend sees the same words.
"""

import torch
from torch import Tensor

from flatkern.ops import _check
from flatkern.ops._library import define, implement, kernel

_SCHEMA = (
    "(SymInt rows, SymInt cols, Tensor key, *, SymInt row_offset=0, SymInt col_offset=0) -> Tensor"
)
define("philox_bits", _SCHEMA)
define("noise", _SCHEMA)
define("uniform", _SCHEMA)


def philox_bits(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """The raw Philox4x32-10 words behind `noise`.

    Counter words are (row, col // 4, tensor, draw), key words (seed, step); element (i, j) is
    output word j % 4. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011.

    Args:
        rows, cols: shape of the block.
        key: int64 [4] = (seed, step, draw, tensor), see `flatkern.NoiseKey`.
        row_offset, col_offset: global coordinates of the block's first element;
            rows end within 2^32, columns within 2^34.

    Returns:
        int64 [rows, cols], values in [0, 2^32), on the key's device.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """
    _check_kinds("philox_bits", rows, cols, key, row_offset, col_offset)
    return torch.ops.flatkern.philox_bits(
        rows, cols, key, row_offset=row_offset, col_offset=col_offset
    )


def noise(rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0) -> Tensor:
    """Standard normals z, a pure function of the key and the coordinates.

    Words (a, b) of a pair give u = a 2^-32 + 2^-33, v = int32(b) 2^-31 and, by Box-Muller,
    z = sqrt(-2 ln u) cos(pi v) for the even column, sin for the odd one.

    Args:
        rows, cols: shape of the block.
        key: int64 [4] = (seed, step, draw, tensor), see `flatkern.NoiseKey`.
        row_offset, col_offset: global coordinates of the block's first element;
            rows end within 2^32, columns within 2^34.

    Returns:
        float32 [rows, cols] on the key's device.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Equivalent eager code, up to the last bits:

        words = philox_bits(rows, cols, key).view(rows, cols // 2, 2)   # cols % 4 == 0
        a, b = words.unbind(-1)
        radius = (-2 * (a.float() * 2**-32 + 2**-33).log()).sqrt()
        angle = torch.pi * b.to(torch.int32).float() * 2**-31
        z = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(rows, cols)
    """
    _check_kinds("noise", rows, cols, key, row_offset, col_offset)
    return torch.ops.flatkern.noise(rows, cols, key, row_offset=row_offset, col_offset=col_offset)


def uniform(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Uniform values u in (-1, 1), a pure function of the key and the coordinates.

    u = (2 k + 1) 2^-24 - 1, with k the upper 24 bits of the element's word: symmetric around 0 and
    never 0, of variance (1 - 2^-48) / 3. Nothing is rounded, so all implementations give the same
    bits. The words are those of `noise`: take another draw where both are wanted independent.

    Args:
        rows, cols: shape of the block.
        key: int64 [4] = (seed, step, draw, tensor), see `flatkern.NoiseKey`.
        row_offset, col_offset: global coordinates of the block's first element;
            rows end within 2^32, columns within 2^34.

    Returns:
        float32 [rows, cols] on the key's device.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Equivalent eager code:

        u = ((philox_bits(rows, cols, key) >> 7 | 1) - 2**24).float() * 2**-24
    """
    _check_kinds("uniform", rows, cols, key, row_offset, col_offset)
    return torch.ops.flatkern.uniform(rows, cols, key, row_offset=row_offset, col_offset=col_offset)


def _check_kinds(
    op: str, rows: int, cols: int, key: Tensor, row_offset: int, col_offset: int
) -> None:
    sizes = {"rows": rows, "cols": cols, "row_offset": row_offset, "col_offset": col_offset}
    _check.kinds(op, (int, torch.SymInt), **sizes)
    _check.kinds(op, Tensor, key=key)


def _check_values(
    op: str, rows: int, cols: int, key: Tensor, row_offset: int, col_offset: int
) -> None:
    _check.key(op, key)
    _check.offsets(op, rows, cols, row_offset, col_offset)


def _select_philox_bits(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("philox_bits", rows, cols, key, row_offset, col_offset)
    run = kernel("philox_bits", key)
    return run(rows, cols, key, row_offset=row_offset, col_offset=col_offset)


def _select_noise(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("noise", rows, cols, key, row_offset, col_offset)
    run = kernel("noise", key)
    return run(rows, cols, key, row_offset=row_offset, col_offset=col_offset)


def _select_uniform(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("uniform", rows, cols, key, row_offset, col_offset)
    run = kernel("uniform", key)
    return run(rows, cols, key, row_offset=row_offset, col_offset=col_offset)


def _fake_philox_bits(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("philox_bits", rows, cols, key, row_offset, col_offset)
    return key.new_empty((rows, cols))


def _fake_noise(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("noise", rows, cols, key, row_offset, col_offset)
    return key.new_empty((rows, cols), dtype=torch.float32)


def _fake_uniform(rows, cols, key, *, row_offset=0, col_offset=0):
    _check_values("uniform", rows, cols, key, row_offset, col_offset)
    return key.new_empty((rows, cols), dtype=torch.float32)


implement("philox_bits", _select_philox_bits, _fake_philox_bits)
implement("noise", _select_noise, _fake_noise)
implement("uniform", _select_uniform, _fake_uniform)
