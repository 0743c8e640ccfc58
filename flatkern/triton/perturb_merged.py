"""Row norm, scale and perturbation in one kernel: the second read of a row finds it in L2."""

import math

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from flatkern.triton import _launch
from flatkern.triton.noise import philox_row
from flatkern.triton.perturb import perturb_, perturb_rows, split_scale
from flatkern.triton.row_norm import adapter_arguments, row_norms, scaled_row_norm


@triton.jit(
    do_not_specialize=["rows", "cols", "rank", "weight_stride", "relative_scale", "row_offset"]
)
def perturb_merged_kernel(
    weight,
    row_scale,
    lora_A,
    lora_B,
    key,
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
    row_offset,
    ALIGNED: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
):
    """row_scale = relative_scale * row norms, then the noise; the bits of the two kernels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows past the last read the last and write nothing: loads need no mask.
    read = tl.minimum(row, rows - 1)[:, None]
    weight += read * (weight_stride.to(tl.int64) * WEIGHT_UNIT)
    norms = row_norms(
        weight,
        lora_A,
        lora_B + read * b_row_stride,
        scaling,
        cols,
        rank,
        a_row_stride,
        a_col_stride,
        b_col_stride,
        WEIGHT_UNIT,
        ROWS,
        COLS,
        ADAPTERS,
    )
    c = norms * relative_scale
    tl.store(row_scale + row, c, mask=row < rows)
    scale, after = split_scale(c)
    row = row[:, None]
    state = philox_row(key, (row + row_offset).to(tl.uint32))
    perturb_rows(
        (weight, weight, row < rows),
        (state, tl.full((1, 1), 0, tl.uint32), scale[:, None], after[:, None]),
        0,
        cols,
        ALIGNED,
        ROWS,
        VECTORS,
        WIDTH,
        UNROLL,
        ELEMENTWISE,
        False,
    )


def perturb_merged_(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """c = sigma / sqrt(n) * ||(W + s B A)_i||, then `perturb_`; returns c, float32 [m]."""
    rows, cols = weight.shape
    relative_scale = sigma / math.sqrt(max(cols, 1))
    if rows == 0 or cols == 0 or not _launch.fits_one_pass(weight):
        row_scale = scaled_row_norm(weight, lora_A, lora_B, scaling, relative_scale)
        perturb_(weight, row_scale, key, elementwise=elementwise, row_offset=row_offset)
        return row_scale
    row_scale = empty(rows, dtype=float32, device=weight.device)
    lora_A, lora_B, rank = adapter_arguments(weight, lora_A, lora_B)
    width = _launch.store_width(weight.dtype)
    aligned = _launch.aligned(width, cols, 0, weight)
    width = width if aligned else 4
    unit = width if aligned else 1
    with _launch.on_device_of(weight):
        perturb_merged_kernel[(-(-rows // _launch.NORM_TILE.rows),)](
            weight,
            row_scale,
            lora_A,
            lora_B,
            key.contiguous(),
            scaling,
            relative_scale,
            rows,
            cols,
            rank,
            weight.stride(0) // unit,
            *lora_A.stride(),
            *lora_B.stride(),
            _launch.word(row_offset),
            ALIGNED=aligned,
            WEIGHT_UNIT=unit,
            ROWS=_launch.NORM_TILE.rows,
            COLS=_launch.NORM_TILE.cols,
            ADAPTERS=_launch.adapters(rank),
            VECTORS=_launch.merged_vectors(),
            WIDTH=width,
            UNROLL=4,
            ELEMENTWISE=elementwise,
            **_launch.MERGED_OPTIONS,
        )
    return row_scale
