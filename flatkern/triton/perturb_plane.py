"""W + c z + d y: one pass over the weight, two noises made in registers."""

import triton
import triton.language as tl
from torch import Tensor

from flatkern.triton import _launch
from flatkern.triton.noise import UNROLL, begin_rows, noise_tile, philox_row
from flatkern.triton.numeric import keep_finite, widen
from flatkern.triton.perturb import split_scale


@triton.jit
def _plane_tile(
    block,
    first,
    second,
    first_group,
    tile,
    mask,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of columns; `block` is (out, weight): pointers [ROWS, 1] to the chunk's first."""
    out, weight = block
    vector = tile * VECTORS + tl.arange(0, VECTORS)[None, :]
    group = first_group + (vector * (WIDTH // 4)).to(tl.uint32)
    column = tile * (VECTORS * WIDTH) + tl.arange(0, VECTORS * WIDTH)[None, :]
    before = tl.load(weight + column, mask=mask)
    state, scale, after = first
    other_state, other_scale, other_after = second
    e = noise_tile(state, group, scale, ROWS, VECTORS, WIDTH) * after
    e += noise_tile(other_state, group, other_scale, ROWS, VECTORS, WIDTH) * other_after
    wide = widen(before)
    tl.store(out + column, keep_finite(wide + e, before, wide, out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("rows", "cols", "weight_stride", "out_stride"),
        *("row_offset", "group_offset", "shift", "tiles"),
    ]
)
def perturb_plane_kernel(
    out,
    weight,
    row_scales,
    keys,
    rows,
    cols,
    weight_stride,
    out_stride,
    row_offset,
    group_offset,
    shift,
    tiles,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out = weight + c z + d y. ALIGNED: shift is 0, cols and strides multiples of WIDTH.

    Strides between rows are then in units of WIDTH elements.
    """
    unit: tl.constexpr = WIDTH if ALIGNED else 1
    span: tl.constexpr = VECTORS * WIDTH
    row, state, begin, first_group, last = begin_rows(
        keys, rows, cols, row_offset, group_offset, shift, tiles, ROWS, span
    )
    other_state = philox_row(keys + 4, (row + row_offset).to(tl.uint32))
    row_mask = row < rows
    scale, after = split_scale(tl.load(row_scales + row, mask=row_mask, other=0.0))
    other_scale, other_after = split_scale(
        tl.load(row_scales + rows + row, mask=row_mask, other=0.0)
    )
    first, second = (state, scale, after), (other_state, other_scale, other_after)
    start = begin if ALIGNED else begin - shift
    block = (
        out + row * (out_stride.to(tl.int64) * unit) + start,
        weight + row * (weight_stride.to(tl.int64) * unit) + start,
    )
    column = tl.arange(0, span)[None, :]
    done = 0
    if ALIGNED:
        done = last // (span * UNROLL) * UNROLL
        for i in range(done // UNROLL):
            for u in tl.static_range(UNROLL):
                tile = i * UNROLL + u
                _plane_tile(block, first, second, first_group, tile, row_mask, ROWS, VECTORS, WIDTH)
    for tile in range(done, (last + span - 1) // span):
        j = tile * span + column
        if ALIGNED:
            # Cut between vectors, which keeps the accesses wide.
            mask = row_mask & (j // WIDTH < last // WIDTH)
        else:
            mask = row_mask & (begin + j >= shift) & (j < last)
        _plane_tile(block, first, second, first_group, tile, mask, ROWS, VECTORS, WIDTH)


def perturb_plane(
    weight: Tensor,
    row_scales: Tensor,
    keys: Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    out: Tensor,
) -> None:
    """W + e into `out`, e_ij = c_i z_ij + d_i y_ij; `out` may be the weight."""
    rows, cols = weight.shape
    if rows == 0 or cols == 0:
        return
    width = _launch.store_width(out.dtype)
    aligned = _launch.aligned(width, cols, col_offset, weight, out)
    # Unaligned rows are accessed one by one; groups of 4 keep the noise simple.
    width = width if aligned else 4
    shift = col_offset % 4
    tile = _launch.elementwise_tile(cols + shift, width)
    unit = width if aligned else 1
    # Strides of one row mean nothing, and need not divide.
    with _launch.on_device_of(weight):
        perturb_plane_kernel[_launch.elementwise_grid(rows, cols + shift, tile)](
            out,
            weight,
            row_scales,
            keys,
            rows,
            cols,
            weight.stride(0) // unit,
            out.stride(0) // unit,
            _launch.word(row_offset),
            _launch.word(col_offset // 4),
            shift,
            tile.tiles,
            ALIGNED=aligned,
            ROWS=tile.rows,
            VECTORS=tile.vectors,
            WIDTH=width,
            **_launch.OPTIONS,
        )
