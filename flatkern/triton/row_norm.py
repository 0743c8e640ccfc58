"""Row norms of W + s B A, tile by tile: the merged weight lives in registers only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatkern.triton import _launch
from flatkern.triton.numeric import INTERPRETED, round_to, widen

# Squares are summed in float32 over this many tiles, then moved on to float64.
TILES_PER_SUM = tl.constexpr(8)
# Columns of B and rows of A in one product of tiles, the least that there is.
RANKS = tl.constexpr(16)


@triton.jit
def _parts(x):
    """float32 as a sum of three bfloat16, exact while the last is not denormal."""
    high = round_to(x, tl.bfloat16)
    rest = x - widen(high)
    middle = round_to(rest, tl.bfloat16)
    return high, middle, round_to(rest - widen(middle), tl.bfloat16)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        # The interpreter would multiply the codes.
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _add_product(b, a, total):
    """total + b a, in six products of bfloat16 parts: what they leave out is below 2^-26."""
    b0, b1, b2 = _parts(b)
    a0, a1, a2 = _parts(a)
    total = _dot(b2, a0, total)
    total = _dot(b0, a2, total)
    total = _dot(b1, a1, total)
    total = _dot(b1, a0, total)
    total = _dot(b0, a1, total)
    return _dot(b0, a0, total)


@triton.jit
def _merged_tile(
    weight,
    lora_A,
    lora_B,
    scaling,
    j,
    mask,
    rank,
    a_row_stride,
    a_col_stride,
    b_col_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADAPTERS: tl.constexpr,
):
    """float32 W + s B A of columns `j` [1, COLS], 0 where `mask` is off."""
    merged = widen(tl.load(weight + j, mask=mask, other=0.0))
    if ADAPTERS != "none":
        product = tl.zeros((ROWS, COLS), tl.float32)
        # One chunk leaves no loop, so that the loop over columns is the one whose loads run ahead.
        chunks = 1 if ADAPTERS == "one chunk" else (rank + RANKS - 1) // RANKS
        for chunk in range(chunks):
            k = chunk * RANKS + tl.arange(0, RANKS)
            b = tl.load(lora_B + k[None, :] * b_col_stride, mask=k[None, :] < rank, other=0.0)
            a_at = lora_A + k[:, None].to(tl.int64) * a_row_stride + j * a_col_stride
            a = tl.load(a_at, mask=(k[:, None] < rank) & mask, other=0.0)
            product = _add_product(widen(b), widen(a), product)
        merged += scaling * product
    return merged


@triton.jit
def _sum_squares_wide(
    weight,
    lora_A,
    lora_B,
    scaling,
    cols,
    rank,
    a_row_stride,
    a_col_stride,
    b_col_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADAPTERS: tl.constexpr,
):
    """The same in float64 throughout, for rows whose squares leave the range of float32."""
    total = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, cols, COLS):
        j = begin + tl.arange(0, COLS)[None, :]
        mask = j < cols
        merged = widen(tl.load(weight + j, mask=mask, other=0.0)).to(tl.float64)
        if ADAPTERS != "none":
            for k in range(rank):
                a = tl.load(lora_A + k * a_row_stride + j * a_col_stride, mask=mask, other=0.0)
                b = widen(tl.load(lora_B + k * b_col_stride)).to(tl.float64)
                merged += scaling * b * widen(a).to(tl.float64)
        total += tl.sum(merged * merged, axis=1)
    return total


@triton.jit
def row_norms(
    weight,
    lora_A,
    lora_B,
    scaling,
    cols,
    rank,
    a_row_stride,
    a_col_stride,
    b_col_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADAPTERS: tl.constexpr,
):
    """Norms float32 [ROWS] of the rows that `weight` and `lora_B`, pointers [ROWS, 1], begin.

    The result of a row depends on nothing else in the tile. cols is a multiple of WIDTH, which rows
    are aligned to.
    """
    total = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, cols, COLS * TILES_PER_SUM):
        squares = tl.zeros((ROWS, COLS), tl.float32)
        for first in range(begin, tl.minimum(begin + COLS * TILES_PER_SUM, cols), COLS):
            j = first + tl.arange(0, COLS)[None, :]
            # Cut between vectors, which keeps the accesses wide.
            mask = j // WIDTH < cols // WIDTH
            merged = _merged_tile(
                weight,
                lora_A,
                lora_B,
                scaling,
                j,
                mask,
                rank,
                a_row_stride,
                a_col_stride,
                b_col_stride,
                ROWS,
                COLS,
                ADAPTERS,
            )
            squares = tl.fma(merged, merged, squares)
        total += tl.sum(squares.to(tl.float64), axis=1)
    # Outside this range, or NaN, a square may have overflowed or lost its bits.
    in_range = (total > 1e-28) & (total < 1e37)
    if tl.min(in_range.to(tl.int32)) == 0:
        wide = _sum_squares_wide(
            weight,
            lora_A,
            lora_B,
            scaling,
            cols,
            rank,
            a_row_stride,
            a_col_stride,
            b_col_stride,
            ROWS,
            COLS,
            ADAPTERS,
        )
        total = tl.where(in_range, total, wide)
    return tl.sqrt(total).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "cols", "rank", "weight_stride", "relative_scale"])
def row_norm_kernel(
    norm,
    weight,
    lora_A,
    lora_B,
    scaling,
    relative_scale,
    rows,
    cols,
    rank,
    weight_stride,
    a_row_stride,
    a_col_stride,
    b_row_stride,
    b_col_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADAPTERS: tl.constexpr,
):
    """Norms times relative_scale. The stride of weight rows is in units of WIDTH elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows past the last read the last and write nothing: loads need no mask.
    read = tl.minimum(row, rows - 1)[:, None]
    norms = row_norms(
        weight + read * (weight_stride.to(tl.int64) * WIDTH),
        lora_A,
        lora_B + read * b_row_stride,
        scaling,
        cols,
        rank,
        a_row_stride,
        a_col_stride,
        b_col_stride,
        WIDTH,
        ROWS,
        COLS,
        ADAPTERS,
    )
    tl.store(norm + row, norms * relative_scale, mask=row < rows)


def adapter_arguments(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """lora_A, lora_B and their rank; without adapters rank 0 and tensors that nobody reads."""
    if lora_A is None or lora_B is None or lora_A.shape[0] == 0:
        return weight, weight, 0
    if lora_A.dtype == torch.float64:
        lora_A = lora_A.float()
    if lora_B.dtype == torch.float64:
        lora_B = lora_B.float()
    return lora_A, lora_B, lora_A.shape[0]


def scaled_row_norm(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    relative_scale: float,
) -> Tensor:
    """float32(relative_scale) * ||(W + s B A)_i||_2, float32 [m]."""
    rows, cols = weight.shape
    norm = torch.zeros(rows, dtype=torch.float32, device=weight.device)
    if rows == 0 or cols == 0:
        return norm
    lora_A, lora_B, rank = adapter_arguments(weight, lora_A, lora_B)
    width = _launch.store_width(weight.dtype)
    if not _launch.aligned(width, cols, 0, weight):
        width = 1
    tile = _launch.NORM_TILE
    with _launch.on_device_of(weight):
        row_norm_kernel[(-(-rows // tile.rows),)](
            norm,
            weight,
            lora_A,
            lora_B,
            scaling,
            relative_scale,
            rows,
            cols,
            rank,
            weight.stride(0) // width,
            *lora_A.stride(),
            *lora_B.stride(),
            WIDTH=width,
            ROWS=tile.rows,
            COLS=tile.cols,
            ADAPTERS=_launch.adapters(rank),
            **_launch.NORM_OPTIONS,
        )
    return norm


def row_norm(
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Norms of the rows of W + s B A, float32 [m]."""
    return scaled_row_norm(weight, lora_A, lora_B, scaling, 1.0)
