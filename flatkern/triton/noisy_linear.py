"""Products with a noisy weight that is never written: the noise is made where a tile is multiplied.

For few tokens: every block of tokens makes the noise of the whole weight again. The tiles have
`perturb`'s bits, products are exact and sums in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatkern.triton import _launch
from flatkern.triton.noise import noise_tile, philox_row
from flatkern.triton.numeric import INTERPRETED, round_to, widen
from flatkern.triton.perturb import noisy_values, split_scale


@triton.jit
def _noisy_tile(
    weight,
    mask,
    state,
    group,
    scale,
    after,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
):
    """W_noisy [ROWS, VECTORS * WIDTH] in `dtype`; where masked, finite."""
    # Nearly always times 1, exactly: cheaper than a second loop.
    e = noise_tile(state, group, scale, ROWS, VECTORS, WIDTH) * after
    before = tl.load(weight, mask=mask, other=0.0)
    return noisy_values(before, e, dtype, ELEMENTWISE, False)


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:
        # The interpreter would multiply the codes of bfloat16.
        return tl.dot(widen(a), widen(b), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums)


_PER_CALL = ["tokens", "row_offset", "group_offset", "shift", "steps"]


@triton.jit(do_not_specialize=[*_PER_CALL, "weight_stride"])
def noisy_linear_kernel(
    out,
    x,
    weight,
    bias,
    row_scale,
    key,
    tokens,
    rows,
    cols,
    weight_stride,
    row_offset,
    group_offset,
    shift,
    steps,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
):
    """out[split] = x W_noisy^T (+ bias) over the split's columns, [splits, tokens, rows].

    Columns are counted from the first of group `group_offset`, which is `shift` before column 0.
    x and the parts are dense; x's rows hold whole units of UNIT columns, and the weight's stride
    counts units of WEIGHT_UNIT. What lies outside is read from inside, or as 0, and not written.
    """
    first = tl.program_id(0) * ROWS
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    row = tl.minimum(first.to(tl.int64) + tl.arange(0, ROWS)[:, None], rows - 1)
    depth: tl.constexpr = VECTORS * WIDTH
    scale, after = split_scale(tl.load(row_scale + row))
    state = philox_row(key, (row + row_offset).to(tl.uint32))
    x += tl.minimum(token, tokens - 1) * (cols // UNIT * UNIT)
    weight += row * (weight_stride.to(tl.int64) * WEIGHT_UNIT)
    if not ALIGNED:
        x -= shift
        weight -= shift
    last = cols + shift
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, (last + depth - 1) // depth)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for tile in range(begin, end):
        j = tile * depth + tl.arange(0, depth)[None, :]
        vector = tile * VECTORS + tl.arange(0, VECTORS)[None, :]
        # Cut between vectors, which keeps the accesses wide.
        mask = j // WIDTH < last // WIDTH if ALIGNED else (j >= shift) & (j < last)
        noisy = _noisy_tile(
            weight + j,
            mask,
            state,
            (group_offset + vector * (WIDTH // 4)).to(tl.uint32),
            scale,
            after,
            x.dtype.element_ty,
            ROWS,
            VECTORS,
            WIDTH,
            ELEMENTWISE,
        )
        sums = _dot(tl.load(x + j, mask=mask, other=0.0), tl.trans(noisy), sums)
    row = first + tl.arange(0, ROWS)[None, :]
    if BIAS:
        sums += widen(tl.load(bias + tl.minimum(row, rows - 1)))
    out += (tl.program_id(2).to(tl.int64) * tokens + token) * rows + row
    tl.store(out, round_to(sums, out.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit(do_not_specialize=[*_PER_CALL, "weight_stride"])
def noisy_linear_grad_x_kernel(
    out,
    grad,
    weight,
    row_scale,
    key,
    tokens,
    rows,
    cols,
    weight_stride,
    row_offset,
    group_offset,
    shift,
    steps,
    ALIGNED: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
):
    """out[split] = grad W_noisy over the split's rows, [splits, tokens, cols]."""
    vectors: tl.constexpr = COLS // WIDTH
    first = tl.program_id(0) * COLS
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    grad += tl.minimum(token, tokens - 1) * (rows // GRAD_UNIT * GRAD_UNIT)
    j = first + tl.arange(0, COLS)[None, :]
    vector = first // WIDTH + tl.arange(0, vectors)[None, :]
    group = (group_offset + vector * (WIDTH // 4)).to(tl.uint32)
    last = cols + shift
    if ALIGNED:
        mask = j // WIDTH < last // WIDTH
    else:
        mask = (j >= shift) & (j < last)
        weight -= shift
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, (rows + ROWS - 1) // ROWS)
    sums = tl.zeros((TOKENS, COLS), tl.float32)
    for tile in range(begin, end):
        row = tl.minimum(tile * ROWS + tl.arange(0, ROWS)[:, None], rows - 1).to(tl.int64)
        scale, after = split_scale(tl.load(row_scale + row))
        noisy = _noisy_tile(
            weight + row * (weight_stride.to(tl.int64) * WEIGHT_UNIT) + j,
            mask,
            philox_row(key, (row + row_offset).to(tl.uint32)),
            group,
            scale,
            after,
            grad.dtype.element_ty,
            ROWS,
            vectors,
            WIDTH,
            ELEMENTWISE,
        )
        i = tile * ROWS + tl.arange(0, ROWS)[None, :]
        inside = i // GRAD_UNIT < rows // GRAD_UNIT
        sums = _dot(tl.load(grad + i, mask=inside, other=0.0), noisy, sums)
    out += (tl.program_id(2).to(tl.int64) * tokens + token) * cols + (j - shift)
    tl.store(out, round_to(sums, out.dtype.element_ty), mask=(token < tokens) & mask)


@triton.jit(do_not_specialize=["count", "cols", "splits"])
def noisy_linear_sum_kernel(
    out, parts, bias, count, cols, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = the sum over splits, in order, of parts [splits, count] (+ bias), rounded once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    sums = tl.load(parts + i, mask=mask)
    for _ in range(1, splits):
        parts += count
        sums += tl.load(parts + i, mask=mask)
    if BIAS:
        sums += widen(tl.load(bias + i % cols, mask=mask))
    tl.store(out + i, round_to(sums, out.dtype.element_ty), mask=mask)


def _dense(x: Tensor) -> Tensor:
    """x, or a copy whose rows follow one another from an aligned address."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _parts(x: Tensor, tile: _launch.ProductTile, outputs: int) -> Tensor:
    """Where the kernels write: the result itself where the reduction is whole."""
    dtype = x.dtype if tile.splits == 1 else torch.float32
    return torch.empty((tile.splits, x.shape[0], outputs), dtype=dtype, device=x.device)


def _sum(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The parts' sum in float32 (+ bias), rounded once."""
    splits, tokens, cols = parts.shape
    if splits == 1:
        return parts[0]
    out = torch.empty((tokens, cols), dtype=dtype, device=parts.device)
    noisy_linear_sum_kernel[(-(-out.numel() // _launch.SUM_BLOCK),)](
        out,
        parts,
        out if bias is None else bias,
        out.numel(),
        cols,
        splits,
        BIAS=bias is not None,
        BLOCK=_launch.SUM_BLOCK,
        **_launch.OPTIONS,
    )
    return out


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    elementwise: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """x W_noisy^T + b, [tokens, m], from x [tokens, n] bfloat16 or float16.

    W_noisy is `perturb(weight, row_scale, key, dtype=x.dtype, ...)` bit for bit; b [m] is of x's
    dtype. Sums are in float32, in an order that the shape alone decides, rounded once.
    """
    rows, cols = weight.shape
    tokens = x.shape[0]
    if tokens == 0 or rows == 0 or cols == 0:
        y = x.new_zeros((tokens, rows))
        return y if bias is None else y + bias
    x = _dense(x)
    width = _launch.store_width(x.dtype)
    aligned = _launch.aligned(width, cols, col_offset, weight)
    # Unaligned rows are accessed one by one; groups of 4 keep the noise simple.
    width, shift = width if aligned else 4, col_offset % 4
    weight_unit = _launch.store_width(weight.dtype) if aligned else 1
    tile = _launch.product_tile(tokens, rows, cols + shift)
    parts = _parts(x, tile, rows)
    with _launch.on_device_of(weight):
        noisy_linear_kernel[-(-rows // tile.outputs), -(-tokens // tile.tokens), tile.splits](
            parts,
            x,
            weight,
            x if bias is None else bias,
            row_scale,
            key.contiguous(),
            tokens,
            rows,
            cols,
            weight.stride(0) // weight_unit,
            _launch.word(row_offset),
            _launch.word(col_offset // 4),
            shift,
            tile.steps,
            ALIGNED=aligned,
            UNIT=width if aligned else 1,
            WEIGHT_UNIT=weight_unit,
            BIAS=bias is not None and tile.splits == 1,
            TOKENS=tile.tokens,
            ROWS=tile.outputs,
            VECTORS=tile.depth // width,
            WIDTH=width,
            ELEMENTWISE=elementwise,
            **_launch.PRODUCT_OPTIONS,
        )
        return _sum(parts, bias, x.dtype)


def noisy_linear_grad_x(
    grad: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """grad W_noisy, [tokens, n], from grad [tokens, m] bfloat16 or float16; as `noisy_linear`."""
    rows, cols = weight.shape
    tokens = grad.shape[0]
    if tokens == 0 or rows == 0 or cols == 0:
        return grad.new_zeros((tokens, cols))
    grad = _dense(grad)
    width = _launch.store_width(grad.dtype)
    grad_unit = width if rows % width == 0 else 1
    aligned = _launch.aligned(width, cols, col_offset, weight)
    width, shift = width if aligned else 4, col_offset % 4
    weight_unit = _launch.store_width(weight.dtype) if aligned else 1
    tile = _launch.product_tile(tokens, cols + shift, rows)
    parts = _parts(grad, tile, cols)
    with _launch.on_device_of(weight):
        grid = -(-(cols + shift) // tile.outputs), -(-tokens // tile.tokens), tile.splits
        noisy_linear_grad_x_kernel[grid](
            parts,
            grad,
            weight,
            row_scale,
            key.contiguous(),
            tokens,
            rows,
            cols,
            weight.stride(0) // weight_unit,
            _launch.word(row_offset),
            _launch.word(col_offset // 4),
            shift,
            tile.steps,
            ALIGNED=aligned,
            WEIGHT_UNIT=weight_unit,
            GRAD_UNIT=grad_unit,
            TOKENS=tile.tokens,
            COLS=tile.outputs,
            ROWS=tile.depth,
            WIDTH=width,
            ELEMENTWISE=elementwise,
            **_launch.PRODUCT_OPTIONS,
        )
        return _sum(parts, None, grad.dtype)
