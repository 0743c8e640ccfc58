"""Perturb and restore: one pass over the weight, noise made in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatkern.triton import _launch
from flatkern.triton.noise import RADIUS, noise_tile, philox_row
from flatkern.triton.numeric import keep_finite, widen


@triton.jit
def split_scale(c):
    """c as (scale, after): e = float32(scale-folded noise) * after; a non-finite c counts as 0.

    sqrt(|log2 u|) times a scale near the ends of float32 would overflow where c z does not, or lose
    bits that c z has. Such rows are computed well inside and moved back by `after`, a power of 2.
    """
    c = tl.where(tl.abs(c) < float("inf"), c, 0.0)
    size = tl.abs(c)
    huge = size > 2.0**60
    tiny = (size < 2.0**-60) & (size > 0.0)
    before = tl.where(huge, 2.0**-40, tl.where(tiny, 2.0**80, 1.0))
    after = tl.where(huge, 2.0**40, tl.where(tiny, 2.0**-80, 1.0))
    return c * before * RADIUS, after


@triton.jit
def _value(wide, e, ELEMENTWISE: tl.constexpr, RESTORE: tl.constexpr):
    if ELEMENTWISE and RESTORE:
        factor = tl.where(wide > 0, 1.0 + e, tl.where(wide < 0, 1.0 - e, 1.0))
        # Noise that took (nearly) all of an element, or flipped its sign, cannot be divided out.
        return tl.where(factor > 0.0625, tl.div_rn(wide, factor), wide)
    elif ELEMENTWISE:
        return wide + e * tl.abs(wide)
    elif RESTORE:
        return wide - e
    else:
        return wide + e


@triton.jit
def noisy_values(before, e, dtype: tl.constexpr, ELEMENTWISE: tl.constexpr, RESTORE: tl.constexpr):
    """What a tile `before` becomes under noise e = c z, rounded to `dtype`."""
    wide = widen(before)
    return keep_finite(_value(wide, e, ELEMENTWISE, RESTORE), before, wide, dtype)


@triton.jit
def _perturb_tile(
    block,
    noise,
    tile,
    mask,
    MOVE_BACK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    RESTORE: tl.constexpr,
):
    """One tile of `perturb_rows`, the columns of `mask` (None: all of them)."""
    out, weight, row_mask = block
    state, first_group, scale, after = noise
    vector = tile * VECTORS + tl.arange(0, VECTORS)[None, :]
    column = tile * (VECTORS * WIDTH) + tl.arange(0, VECTORS * WIDTH)[None, :]
    before = tl.load(weight + column, mask=mask)
    group = first_group + (vector * (WIDTH // 4)).to(tl.uint32)
    e = noise_tile(state, group, scale, ROWS, VECTORS, WIDTH)
    if MOVE_BACK:
        e = e * after
    noisy = noisy_values(before, e, out.dtype.element_ty, ELEMENTWISE, RESTORE)
    tl.store(out + column, noisy, mask=row_mask if mask is None else row_mask & mask)


@triton.jit
def perturb_rows(
    block,
    noise,
    first,
    last,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    RESTORE: tl.constexpr,
):
    """Columns [first, last) of a block of rows, counted from the first column of a group of noise.

    `block` is (out, weight, row_mask): pointers [ROWS, 1] to that column; `weight` must be readable
    in every row, `out` is written where `row_mask` is set. `noise` is (philox_row's state, that
    first group, scale, after). ALIGNED promises that `first` is 0, `last` a multiple of WIDTH and
    every row aligned: then ordinary rows take whole vectors, UNROLL tiles at once without column
    masks and what is left over one by one. All paths give the same bits.
    """
    column = tl.arange(0, VECTORS * WIDTH)[None, :]
    span: tl.constexpr = VECTORS * WIDTH
    tiles = (last + span - 1) // span
    done = 0
    if ALIGNED:
        ordinary = tl.max((noise[3] != 1.0).to(tl.int32)) == 0
        done = tl.where(ordinary, tiles, 0)
        whole = tl.where(ordinary, last // (span * UNROLL), 0)
        for i in range(whole):
            for u in tl.static_range(UNROLL):
                tile = i * UNROLL + u
                _perturb_tile(
                    block, noise, tile, None, False, ROWS, VECTORS, WIDTH, ELEMENTWISE, RESTORE
                )
        for tile in range(whole * UNROLL, done):
            # Cut between vectors, which keeps the accesses wide.
            mask = (tile * span + column) // WIDTH < last // WIDTH
            _perturb_tile(
                block, noise, tile, mask, False, ROWS, VECTORS, WIDTH, ELEMENTWISE, RESTORE
            )
    for tile in range(done, tiles):
        j = tile * span + column
        mask = (j >= first) & (j < last)
        _perturb_tile(block, noise, tile, mask, True, ROWS, VECTORS, WIDTH, ELEMENTWISE, RESTORE)


@triton.jit(
    do_not_specialize=[
        "rows",
        "cols",
        "weight_stride",
        "out_stride",
        "row_offset",
        "group_offset",
        "shift",
        "iterations",
    ]
)
def perturb_kernel(
    out,
    weight,
    row_scale,
    key,
    rows,
    cols,
    weight_stride,
    out_stride,
    row_offset,
    group_offset,
    shift,
    iterations,
    ALIGNED: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    RESTORE: tl.constexpr,
):
    """out = weight + noise. Strides between rows are in units of WEIGHT_UNIT, OUT_UNIT elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row < rows
    # Rows past the last read the last and write nothing: loads need no mask.
    row = tl.minimum(row, rows - 1)
    scale, after = split_scale(tl.load(row_scale + row))
    state = philox_row(key, (row + row_offset).to(tl.uint32))
    # Counted from the first column's group, which may begin `shift` columns before it.
    chunk = iterations * (VECTORS * WIDTH * UNROLL)
    begin = tl.program_id(1).to(tl.int64) * chunk
    if ALIGNED:
        # shift is 0; left out, because its unknown alignment would narrow every access.
        first, start = 0, begin
    else:
        first, start = tl.maximum(shift - begin, 0).to(tl.int32), begin - shift
    last = tl.minimum(cols + shift - begin, chunk).to(tl.int32)
    block = (
        out + row * (out_stride.to(tl.int64) * OUT_UNIT) + start,
        weight + row * (weight_stride.to(tl.int64) * WEIGHT_UNIT) + start,
        row_mask,
    )
    noise = (state, (group_offset + begin // 4).to(tl.uint32), scale, after)
    perturb_rows(
        block, noise, first, last, ALIGNED, ROWS, VECTORS, WIDTH, UNROLL, ELEMENTWISE, RESTORE
    )


def _launch_kernel(
    out: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    elementwise: bool,
    row_offset: int,
    col_offset: int,
    restore: bool = False,
) -> None:
    rows, cols = weight.shape
    if rows == 0 or cols == 0:
        return
    width = _launch.store_width(out.dtype)
    aligned = _launch.aligned(width, cols, col_offset, weight, out)
    # Unaligned rows are accessed one by one; groups of 4 keep the noise simple.
    width = width if aligned else 4
    shift = col_offset % 4
    tile = _launch.elementwise_tile(cols + shift, width)
    weight_unit = _launch.store_width(weight.dtype) if aligned else 1
    out_unit = width if aligned else 1
    with _launch.on_device_of(weight):
        perturb_kernel[_launch.elementwise_grid(rows, cols + shift, tile)](
            out,
            weight,
            row_scale,
            key.contiguous(),
            rows,
            cols,
            weight.stride(0) // weight_unit,
            out.stride(0) // out_unit,
            _launch.word(row_offset),
            _launch.word(col_offset // 4),
            shift,
            tile.iterations,
            ALIGNED=aligned,
            WEIGHT_UNIT=weight_unit,
            OUT_UNIT=out_unit,
            ROWS=tile.rows,
            VECTORS=tile.vectors,
            WIDTH=width,
            UNROLL=tile.unroll,
            ELEMENTWISE=elementwise,
            RESTORE=restore,
            **_launch.OPTIONS,
        )


def perturb_out(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    out: Tensor,
) -> None:
    """`perturb` into `out`, whose dtype is the result's; `out` may be the weight."""
    _launch_kernel(out, weight, row_scale, key, elementwise, row_offset, col_offset)


def perturb(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    dtype: torch.dtype | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """W + e rounded once to `dtype` (default: the weight's); e = c_i z_ij (|W_ij|)."""
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    _launch_kernel(out, weight, row_scale, key, elementwise, row_offset, col_offset)
    return out


def perturb_(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """`perturb` in place."""
    _launch_kernel(weight, weight, row_scale, key, elementwise, row_offset, col_offset)


def restore_(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """Undo `perturb_` up to rounding: S - e, or S / (1 + c_i z_ij sign(S)) if elementwise."""
    _launch_kernel(weight, weight, row_scale, key, elementwise, row_offset, col_offset, True)
