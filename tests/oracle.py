"""Independent statements of what the ops mean, in numpy and float64.

Nothing here imports flatkern. The Philox here is not the package's: it is written once over numpy
integers and inverted, so that a test can choose the random words and ask where they occur.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter, key, rounds=10):
    """Philox4x32 over broadcastable integer arrays, or python ints: four uint64 arrays < 2**32."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    low = np.uint64(MASK)
    shift = np.uint64(32)
    for _ in range(rounds):
        product0 = np.uint64(MULTIPLIERS[0]) * c0
        product1 = np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & low,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & low,
        )
        k0 = (k0 + np.uint64(WEYL[0])) & low
        k1 = (k1 + np.uint64(WEYL[1])) & low
    return c0, c1, c2, c3


def philox_inverse(words, key, rounds=10):
    """The counter whose output under `key` is `words`, in python ints."""
    w0, w1, w2, w3 = words
    inverses = [pow(multiplier, -1, 2**32) for multiplier in MULTIPLIERS]
    for r in reversed(range(rounds)):
        k0 = (key[0] + r * WEYL[0]) & MASK
        k1 = (key[1] + r * WEYL[1]) & MASK
        c0 = (w3 * inverses[0]) & MASK
        c2 = (w1 * inverses[1]) & MASK
        c1 = w0 ^ k0 ^ (MULTIPLIERS[1] * c2 >> 32)
        c3 = w2 ^ k1 ^ (MULTIPLIERS[0] * c0 >> 32)
        w0, w1, w2, w3 = c0, c1, c2, c3
    return w0, w1, w2, w3


def words_at(row, col, key):
    """The word of each global coordinate, as arrays; key = (seed, step, draw, tensor)."""
    row, col = np.broadcast_arrays(np.asarray(row, np.uint64), np.asarray(col, np.uint64))
    seed, step, draw, tensor = key
    block = philox((row, col >> np.uint64(2), tensor, draw), (seed, step))
    lane = col & np.uint64(3)
    return np.choose(lane.astype(np.int64), [np.broadcast_to(word, row.shape) for word in block])


def words(rows, cols, key, row_offset=0, col_offset=0):
    row = np.arange(row_offset, row_offset + rows, dtype=np.uint64)[:, None]
    col = np.arange(col_offset, col_offset + cols, dtype=np.uint64)[None, :]
    return words_at(row, col, key)


def box_muller(first, second):
    """(z_even, z_odd) in float64 from words a and b; u and v are float32, as specified."""
    a = np.asarray(first, np.uint64).astype(np.uint32)
    b = np.asarray(second, np.uint64).astype(np.uint32).view(np.int32)
    u = a.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    v = b.astype(np.float32) * np.float32(2.0**-31)
    assert u.dtype == v.dtype == np.float32
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    angle = np.pi * v.astype(np.float64)
    return radius * np.cos(angle), radius * np.sin(angle)


def normals(rows, cols, key, row_offset=0, col_offset=0):
    """z in float64, [rows, cols]."""
    first_col = col_offset & ~3
    last_col = (col_offset + cols + 3) & ~3
    bits = words(rows, last_col - first_col, key, row_offset, first_col)
    z = np.empty(bits.shape)
    z[:, 0::4], z[:, 1::4] = box_muller(bits[:, 0::4], bits[:, 1::4])
    z[:, 2::4], z[:, 3::4] = box_muller(bits[:, 2::4], bits[:, 3::4])
    start = col_offset - first_col
    return z[:, start : start + cols]


def as_rows(weight):
    return weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))


def dense(weight, lora_A=None, lora_B=None, scaling=1.0):
    """W + s B A, in float64."""
    merged = as_rows(weight).double()
    if lora_A is not None:
        merged = merged + scaling * (lora_B.double() @ lora_A.double())
    return merged


def row_norm(weight, lora_A=None, lora_B=None, scaling=1.0):
    return dense(weight, lora_A, lora_B, scaling).square().sum(1).sqrt()


def row_norm_scale(weight, lora_A=None, lora_B=None, scaling=1.0):
    """Norms of |W| + |s||B||A|: what the rounding of any summation order is relative to."""
    if lora_A is None:
        return row_norm(weight)
    return row_norm(weight.abs(), lora_A.abs(), lora_B.abs(), abs(scaling))


def row_norm_by_algebra(weight, lora_A, lora_B, scaling):
    """The norms of W + s B A without forming it, by expanding the square."""
    w, a, b = as_rows(weight).double(), lora_A.double(), lora_B.double()
    squares = w.square().sum(1)
    squares = squares + 2 * scaling * (b * (w @ a.T)).sum(1)
    squares = squares + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    return squares.clamp_min(0).sqrt()


def perturbed(weight, row_scale, z, *, elementwise=False, dtype=None, sign=1.0):
    """round(float32(W) + float32(c_i z_ij)) one rounding at a time; not-finite cases as specified.

    torch's float32 multiply, add and casts on the CPU each round once, to nearest even.
    """
    dtype = dtype or weight.dtype
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = as_rows(weight)
    scale = torch.where(row_scale.isfinite(), row_scale, torch.zeros_like(row_scale))
    noise = scale[:, None] * (sign * z)
    if elementwise:
        noise = noise * rows.abs().to(wide)
    total = (rows.to(wide) + noise.to(wide)).to(dtype)
    untouched = ~rows.isfinite() | ~total.isfinite()
    return torch.where(untouched, rows.to(dtype), total).view(weight.shape)


def lora_product(x, noisy_weight, bias, lora_A, lora_B, scaling):
    """x W^T + s (x A^T) B^T + b in whatever dtype the arguments have; differentiable."""
    y = F.linear(x, as_rows(noisy_weight), bias)
    if lora_A is not None:
        y = y + scaling * F.linear(F.linear(x, lora_A), lora_B)
    return y
