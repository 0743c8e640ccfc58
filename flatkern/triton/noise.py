"""Philox4x32-10 and Box-Muller as device functions, and the three ops that show them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq

from flatkern.triton import _launch
from flatkern.triton.numeric import INTERPRETED

# z = RADIUS sqrt(|log2 u|) (cos, sin): the constant is multiplied into the scale, once per row.
RADIUS = tl.constexpr((2.0 * 0.6931471805599453) ** 0.5)
# Of an angle's word, as int32.
ANGLE = tl.constexpr(3.141592653589793 * 2.0**-31)


# Products are of 64 bits, not a high and a low one: they compile to one wide multiply. Helper
# functions would read better, but each call costs the interpreter a millisecond.
M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox_row(key, row):
    """What the first three rounds compute for a whole row, as `philox_row` in csrc/philox.h.

    The column enters those rounds in one word only; `row` is uint32, of any shape.
    """
    k0 = tl.load(key).to(tl.uint32)
    k1 = tl.load(key + 1).to(tl.uint32)
    draw = tl.load(key + 2).to(tl.uint32)
    p_tensor = tl.load(key + 3).to(tl.uint32).to(tl.uint64) * M1
    p_row = row.to(tl.uint64) * M0
    c0_1 = (p_tensor >> 32).to(tl.uint32) ^ k0
    c2_1 = (p_row >> 32).to(tl.uint32) ^ draw ^ k1
    k0 = tl.add(k0, W0, sanitize_overflow=False)
    k1 = tl.add(k1, W1, sanitize_overflow=False)
    p1 = c2_1.to(tl.uint64) * M1
    c0_2 = (p1 >> 32).to(tl.uint32) ^ p_tensor.to(tl.uint32) ^ k0
    c2_2 = p_row.to(tl.uint32) ^ k1
    k0 = tl.add(k0, W0, sanitize_overflow=False)
    k1 = tl.add(k1, W1, sanitize_overflow=False)
    p0 = c0_2.to(tl.uint64) * M0
    c0_3 = p1.to(tl.uint32) ^ k0
    c2_3 = (p0 >> 32).to(tl.uint32) ^ k1
    k0 = tl.add(k0, W0, sanitize_overflow=False)
    k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0_1, c2_2, c0_3, c2_3, p0.to(tl.uint32), k0, k1


@triton.jit
def philox_group(state, group):
    """The four output words of (row, group, tensor, draw), from what its row has computed."""
    c0_1, c2_2, c0_3, c2_3, c3, k0, k1 = state
    p0 = (group ^ c0_1).to(tl.uint64) * M0
    p1 = ((p0 >> 32).to(tl.uint32) ^ c2_2).to(tl.uint64) * M1
    c0 = (p1 >> 32).to(tl.uint32) ^ c0_3
    c1 = p1.to(tl.uint32)
    c2 = p0.to(tl.uint32) ^ c2_3
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


_MULTIPLY_PAIR = tl.constexpr("""{
    .reg .b64 first, second;
    mov.b64 first, {$2, $3};
    mov.b64 second, {$4, $5};
    mul.rn.f32x2 first, first, second;
    mov.b64 {$0, $1}, first;
    }""")


@triton.jit
def _multiply_pair(a, b, c, d):
    """a c and b d: one instruction from sm_100 on, each product rounded by itself as ever."""
    return tl.inline_asm_elementwise(
        _MULTIPLY_PAIR,
        "=f,=f,f,f,f,f",
        [a, b, c, d],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _normals(state, group, scale):
    """scale z / RADIUS of a group's four columns."""
    w0, w1, w2, w3 = philox_group(state, group)
    # The product with 2^-32 is exact, so this rounds as often as the specification does.
    u = tl.fma(w0.to(tl.float32), 2.0**-32, 2.0**-33)
    v = tl.fma(w2.to(tl.float32), 2.0**-32, 2.0**-33)
    a = w1.to(tl.int32, bitcast=True).to(tl.float32)
    b = w3.to(tl.int32, bitcast=True).to(tl.float32)
    if INTERPRETED:
        a, b = a * ANGLE, b * ANGLE
        r, s = tl.sqrt(tl.abs(tl.log2(u))) * scale, tl.sqrt(tl.abs(tl.log2(v))) * scale
        return r * tl.cos(a), r * tl.sin(a), s * tl.cos(b), s * tl.sin(b)
    r = tl.sqrt(tl.abs(libdevice.fast_log2f(u)))
    s = tl.sqrt(tl.abs(libdevice.fast_log2f(v)))
    if cuda_capability_geq(10, 0):
        a, b = _multiply_pair(a, b, ANGLE, ANGLE)
        r, s = _multiply_pair(r, s, scale, scale)
        z0, z2 = _multiply_pair(r, s, libdevice.fast_cosf(a), libdevice.fast_cosf(b))
        z1, z3 = _multiply_pair(r, s, libdevice.fast_sinf(a), libdevice.fast_sinf(b))
    else:
        a, b, r, s = a * ANGLE, b * ANGLE, r * scale, s * scale
        z0, z1 = r * libdevice.fast_cosf(a), r * libdevice.fast_sinf(a)
        z2, z3 = s * libdevice.fast_cosf(b), s * libdevice.fast_sinf(b)
    return z0, z1, z2, z3


@triton.jit
def noise_tile(state, group, scale, ROWS: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr):
    """scale z / RADIUS of VECTORS x WIDTH adjacent columns, float32 [ROWS, VECTORS * WIDTH].

    `group` [1, VECTORS] is the first group of each vector, even where WIDTH is 8. Joining, not
    indexing, leaves the WIDTH (4 or 8) columns of a vector in one thread, where a 128-bit store
    wants them.
    """
    z0, z1, z2, z3 = _normals(state, group, scale)
    if WIDTH == 4:
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        z4, z5, z6, z7 = _normals(state, group | 1, scale)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
        z = tl.join(even, odd)
    return tl.reshape(z, (ROWS, VECTORS * WIDTH))


_PER_CALL = ["rows", "cols", "row_offset", "group_offset", "shift", "tiles"]


@triton.jit
def begin_rows(key, rows, cols, row_offset, group_offset, shift, tiles, ROWS: tl.constexpr, SPAN):
    """The program's rows, their Philox state, and its chunk of columns.

    Columns are counted from the first of group `group_offset`, which is `shift` before column 0 of
    the matrix; inside the chunk from its own first.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    state = philox_row(key, (row + row_offset).to(tl.uint32))
    begin = tl.program_id(1).to(tl.int64) * (tiles * SPAN)
    last = tl.minimum(cols + shift - begin, tiles * SPAN).to(tl.int32)
    return row, state, begin, (group_offset + begin // 4).to(tl.uint32), last


# Tiles in an iteration of the loop over whole tiles: they share its counting.
UNROLL = tl.constexpr(4)


@triton.jit
def _unit(word):
    """The value of the op `uniform`: an odd multiple of 2^-24 in (-1, 1); nothing is rounded."""
    odd = (word >> 7 | 1).to(tl.int32, bitcast=True) - 16777216
    return odd.to(tl.float32) * (2.0**-24)


@triton.jit
def _uniform_tile(state, group, ROWS: tl.constexpr, VECTORS: tl.constexpr):
    """Uniform values of VECTORS groups of columns, as `noise_tile`."""
    w0, w1, w2, w3 = philox_group(state, group)
    u = tl.join(tl.join(_unit(w0), _unit(w2)), tl.join(_unit(w1), _unit(w3)))
    return tl.reshape(u, (ROWS, VECTORS * 4))


@triton.jit
def _store_tile(
    out,
    state,
    first_group,
    tile,
    mask,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """A tile of values; `out` is [ROWS, 1], pointers to the first column of the chunk."""
    group = tile * VECTORS + tl.arange(0, VECTORS)[None, :]
    if UNIFORM:
        z = _uniform_tile(state, first_group + group.to(tl.uint32), ROWS, VECTORS)
    else:
        z = noise_tile(state, first_group + group.to(tl.uint32), RADIUS, ROWS, VECTORS, 4)
    tl.store(out + (tile * (VECTORS * 4) + tl.arange(0, VECTORS * 4)[None, :]), z, mask=mask)


@triton.jit
def _fill(
    out,
    key,
    rows,
    cols,
    row_offset,
    group_offset,
    shift,
    tiles,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Values into a contiguous float32 matrix; ALIGNED: shift is 0, cols a multiple of 4."""
    row, state, begin, first_group, last = begin_rows(
        key, rows, cols, row_offset, group_offset, shift, tiles, ROWS, VECTORS * 4
    )
    span: tl.constexpr = VECTORS * 4
    column = tl.arange(0, span)[None, :]
    row_mask = row < rows
    if ALIGNED:
        out += row * (cols // 4 * 4) + begin
        done = last // (span * UNROLL) * UNROLL
        for i in range(done // UNROLL):
            for u in tl.static_range(UNROLL):
                _store_tile(
                    out, state, first_group, i * UNROLL + u, row_mask, ROWS, VECTORS, UNIFORM
                )
        for tile in range(done, (last + span - 1) // span):
            # Cut between vectors, which keeps the stores wide.
            mask = row_mask & ((tile * span + column) // 4 < last // 4)
            _store_tile(out, state, first_group, tile, mask, ROWS, VECTORS, UNIFORM)
    else:
        out += row * cols + (begin - shift)
        for tile in range((last + span - 1) // span):
            j = tile * span + column
            mask = row_mask & (begin + j >= shift) & (j < last)
            _store_tile(out, state, first_group, tile, mask, ROWS, VECTORS, UNIFORM)


@triton.jit(do_not_specialize=_PER_CALL)
def noise_kernel(
    out,
    key,
    rows,
    cols,
    row_offset,
    group_offset,
    shift,
    tiles,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Normals."""
    _fill(
        out, key, rows, cols, row_offset, group_offset, shift, tiles, ALIGNED, ROWS, VECTORS, False
    )


@triton.jit(do_not_specialize=_PER_CALL)
def uniform_kernel(
    out,
    key,
    rows,
    cols,
    row_offset,
    group_offset,
    shift,
    tiles,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Uniform values."""
    _fill(
        out, key, rows, cols, row_offset, group_offset, shift, tiles, ALIGNED, ROWS, VECTORS, True
    )


@triton.jit(do_not_specialize=_PER_CALL)
def philox_bits_kernel(
    out,
    key,
    rows,
    cols,
    row_offset,
    group_offset,
    shift,
    tiles,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Words into a contiguous int64 matrix, two at a time: 128 bits."""
    row, state, begin, first_group, last = begin_rows(
        key, rows, cols, row_offset, group_offset, shift, tiles, ROWS, VECTORS * 4
    )
    row = row[:, :, None]
    if ALIGNED:
        out += row * (cols // 4 * 4) + begin
    else:
        out += row * cols + (begin - shift)
    for tile in range((last + VECTORS * 4 - 1) // (VECTORS * 4)):
        group = tile * VECTORS + tl.arange(0, VECTORS)[None, :]
        w0, w1, w2, w3 = philox_group(state, first_group + group.to(tl.uint32))
        for lane in tl.static_range(0, 4, 2):
            words = tl.join(w2, w3) if lane else tl.join(w0, w1)
            j = group[:, :, None] * 4 + (lane + tl.arange(0, 2)[None, None, :])
            if ALIGNED:
                mask = (row < rows) & (j // 4 < last // 4)
            else:
                mask = (row < rows) & (begin + j >= shift) & (j < last)
            tl.store(out + j, words.to(tl.int64), mask=mask)


def _launch_kernel(
    kernel: triton.JITFunction,
    rows: int,
    cols: int,
    key: Tensor,
    row_offset: int,
    col_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((rows, cols), dtype=dtype, device=key.device)
    if rows == 0 or cols == 0:
        return out
    shift = col_offset % 4
    tile = _launch.elementwise_tile(cols + shift, 4)
    with _launch.on_device_of(key):
        kernel[_launch.elementwise_grid(rows, cols + shift, tile)](
            out,
            key.contiguous(),
            rows,
            cols,
            _launch.word(row_offset),
            _launch.word(col_offset // 4),
            shift,
            tile.tiles,
            ALIGNED=shift == 0 and cols % 4 == 0,
            ROWS=tile.rows,
            VECTORS=tile.vectors,
            **_launch.OPTIONS,
        )
    return out


def philox_bits(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Word of each element, int64 [rows, cols]: counter (row, col // 4, tensor, draw)."""
    arguments = rows, cols, key, row_offset, col_offset
    return _launch_kernel(philox_bits_kernel, *arguments, torch.int64)


def noise(rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0) -> Tensor:
    """Standard normals z, float32 [rows, cols]."""
    arguments = rows, cols, key, row_offset, col_offset
    return _launch_kernel(noise_kernel, *arguments, torch.float32)


def uniform(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Uniform values in (-1, 1), float32 [rows, cols]."""
    arguments = rows, cols, key, row_offset, col_offset
    return _launch_kernel(uniform_kernel, *arguments, torch.float32)
