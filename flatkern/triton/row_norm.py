"""Row norms of W + s B A by algebra: |w|^2 + 2 b.(A w) + b.(A A^T b) of a row w and a row b of sB.

W is read once, and tensor cores multiply it by A in three bfloat16 parts. Rows for which a bound of
the error is too large are formed again in float64; docs/row_norm.md has the bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatkern.triton import _launch
from flatkern.triton.numeric import INTERPRETED, round_to, widen

# Squares are summed in float32 over this many tiles, then moved on to float64.
TILES_PER_SUM = tl.constexpr(8)
# csrc/cuda/row_norm.h has the same: relative errors of |w|^2, |w| u and u^2, where u is the sum of
# |b_k| |A_k|, and what the sum may be off by.
SQUARE_ERROR = tl.constexpr(1e-6)
CROSS_ERROR = tl.constexpr(2.75e-6)
FORM_ERROR = tl.constexpr(1e-12)
SUM_ERROR = tl.constexpr(1.9e-5)


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
def _product(weight, parts, part_stride, mask, RANKS: tl.constexpr):
    """W A^T of a tile, in products of bfloat16 parts: what they leave out is below 2^-26."""
    a0 = tl.load(parts, mask=mask, other=0.0)
    a1 = tl.load(parts + part_stride, mask=mask, other=0.0)
    a2 = tl.load(parts + 2 * part_stride, mask=mask, other=0.0)
    # The smallest first: tensor cores truncate by the largest.
    total = tl.zeros((weight.shape[0], RANKS), tl.float32)
    if weight.dtype == tl.bfloat16:
        total = _dot(weight, a2, total)
        total = _dot(weight, a1, total)
        return _dot(weight, a0, total)
    else:
        w0, w1, w2 = _parts(widen(weight))
        total = _dot(w0, a2, total)
        total = _dot(w1, a1, total)
        total = _dot(w2, a0, total)
        total = _dot(w0, a1, total)
        total = _dot(w1, a0, total)
        return _dot(w0, a0, total)


@triton.jit
def _form(lora_B, gram, k, rank, b_col_stride, scaling, ROWS: tl.constexpr, RANKS: tl.constexpr):
    """b.(A A^T b) and the sum of |b_k| |A_k| over the ranks k [1, RANKS], float64 [ROWS]."""
    known = k < rank
    b = scaling * widen(tl.load(lora_B + k * b_col_stride, mask=known, other=0.0))
    wide = b.to(tl.float64)
    products = tl.zeros((ROWS, RANKS), tl.float64)
    for other in range(rank):
        factor = scaling * widen(tl.load(lora_B + other * b_col_stride))
        products += factor.to(tl.float64) * tl.load(gram + other * rank + k, mask=known, other=0.0)
    norm = tl.sqrt(tl.load(gram + k * (rank + 1), mask=known, other=0.0))
    splits = ((norm > 1e-12) & (norm < 1e15)) | (norm == 0.0)
    size = tl.where(b == 0.0, 0.0, tl.abs(wide) * tl.where(splits, norm, float("inf")))
    return b, tl.sum(wide * products, axis=1), tl.sum(size, axis=1)


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
):
    """In float64 throughout, from the merged weight."""
    total = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, cols, COLS):
        j = begin + tl.arange(0, COLS)[None, :]
        mask = j < cols
        merged = widen(tl.load(weight + j, mask=mask, other=0.0)).to(tl.float64)
        for k in range(rank):
            a_at = lora_A + k * a_row_stride + j.to(tl.int64) * a_col_stride
            a = tl.load(a_at, mask=mask, other=0.0)
            b = scaling * widen(tl.load(lora_B + k * b_col_stride))
            merged += b.to(tl.float64) * widen(a).to(tl.float64)
        total += tl.sum(merged * merged, axis=1)
    return total


@triton.jit
def row_norm_parts_kernel(
    parts, lora_A, rank, cols, a_row_stride, a_col_stride, RANKS: tl.constexpr, COLS: tl.constexpr
):
    """The three parts of A, bfloat16 [3, ranks, cols], of ranks filled up with zeros."""
    k = tl.program_id(1) * RANKS + tl.arange(0, RANKS)[:, None]
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    a_at = lora_A + k.to(tl.int64) * a_row_stride + j.to(tl.int64) * a_col_stride
    a0, a1, a2 = _parts(widen(tl.load(a_at, mask=(k < rank) & (j < cols), other=0.0)))
    at = parts + k.to(tl.int64) * cols + j
    part_stride = tl.num_programs(1).to(tl.int64) * RANKS * cols
    tl.store(at, a0, mask=j < cols)
    tl.store(at + part_stride, a1, mask=j < cols)
    tl.store(at + 2 * part_stride, a2, mask=j < cols)


@triton.jit(do_not_specialize=["rows", "cols", "rank", "weight_stride", "relative_scale"])
def row_norm_kernel(
    norm,
    weight,
    parts,
    gram,
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
    RANKS: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """Norms times relative_scale. The stride of weight rows is in units of WIDTH elements.

    The result of a row depends on nothing else in the tile. cols is a multiple of WIDTH, which rows
    are aligned to. RANKS of them are multiplied at a time, for which W is read once; 0 without
    adapters. Not CHUNKED: once is all.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows past the last read the last and write nothing: loads need no mask.
    read = tl.minimum(row, rows - 1)[:, None]
    weight += read * (weight_stride.to(tl.int64) * WIDTH)
    lora_B += read * b_row_stride
    total = tl.zeros((ROWS,), tl.float64)
    sizes = tl.zeros((ROWS,), tl.float64)
    squared = tl.zeros((ROWS,), tl.float64)
    # One chunk leaves no loop, so that the loop over columns is the one whose loads run ahead.
    chunks = (rank + RANKS - 1) // RANKS if CHUNKED else 1
    for chunk in range(chunks):
        squared = tl.zeros((ROWS,), tl.float64)
        if RANKS > 0:
            k = chunk * RANKS + tl.arange(0, RANKS)
            products = tl.zeros((ROWS, RANKS), tl.float32)
        for begin in range(0, cols, COLS * TILES_PER_SUM):
            squares = tl.zeros((ROWS, COLS), tl.float32)
            for first in range(begin, tl.minimum(begin + COLS * TILES_PER_SUM, cols), COLS):
                j = first + tl.arange(0, COLS)
                # Cut between vectors, which keeps the accesses wide.
                mask = j // WIDTH < cols // WIDTH
                tile = tl.load(weight + j[None, :], mask=mask[None, :], other=0.0)
                wide = widen(tile)
                squares = tl.fma(wide, wide, squares)
                if RANKS > 0:
                    at = parts + k[None, :].to(tl.int64) * cols + j[:, None]
                    part_stride = chunks * RANKS * cols.to(tl.int64)
                    products += _product(tile, at, part_stride, mask[:, None], RANKS)
            squared += tl.sum(squares.to(tl.float64), axis=1)
        if RANKS > 0:
            b, form, size = _form(
                lora_B, gram, k[None, :], rank, b_col_stride, scaling, ROWS, RANKS
            )
            total += 2.0 * tl.sum(b.to(tl.float64) * products.to(tl.float64), axis=1) + form
            sizes += size
    total += squared
    error = squared * SQUARE_ERROR + tl.sqrt(squared) * sizes * (2.0 * CROSS_ERROR)
    error += sizes * sizes * FORM_ERROR
    # Beyond these ends a square may have overflowed or lost its bits; NaN is refused too.
    stands = (total > 1e-28) & (total < 1e37) & (error <= total * SUM_ERROR)
    if tl.min(stands.to(tl.int32)) == 0:
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
        )
        total = tl.where(stands, total, wide)
    tl.store(norm + row, tl.sqrt(total).to(tl.float32) * relative_scale, mask=row < rows)


def _adapters(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """A's parts, A A^T, A, B and their rank; without adapters tensors that nobody reads."""
    if lora_A is None or lora_B is None or lora_A.shape[0] == 0:
        return weight, weight, weight, weight, 0
    lora_A, lora_B = (x.float() if x.dtype == torch.float64 else x for x in (lora_A, lora_B))
    rank, cols = lora_A.shape
    block = _launch.norm_ranks(rank)
    ranks = -(-rank // block) * block
    parts = weight.new_empty((3, ranks, cols), dtype=torch.bfloat16)
    with _launch.on_device_of(weight):
        row_norm_parts_kernel[(-(-cols // _launch.NORM_TILE.cols), ranks // block)](
            parts,
            lora_A,
            rank,
            cols,
            *lora_A.stride(),
            RANKS=block,
            COLS=_launch.NORM_TILE.cols,
        )
    wide = lora_A.double()
    return parts, wide @ wide.T, lora_A, lora_B, rank


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
    parts, gram, lora_A, lora_B, rank = _adapters(weight, lora_A, lora_B)
    width = _launch.store_width(weight.dtype)
    if not _launch.aligned(width, cols, 0, weight):
        width = 1
    tile = _launch.NORM_TILE
    block = _launch.norm_ranks(rank)
    with _launch.on_device_of(weight):
        row_norm_kernel[(-(-rows // tile.rows),)](
            norm,
            weight,
            parts,
            gram,
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
            RANKS=block,
            CHUNKED=rank > block,
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
