"""Where a weight must be, given the noisy weight and the noise: the ranges of the exact residual.

Codes are bit patterns, held in int64. Every float32 operation rounds once, to nearest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_EXPONENT = 0x7F800000
# Bits of the significand, and the smallest exponent a gap is taken from, as its float32 code.
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
_MIN_EXPONENT = {torch.bfloat16: 27 << 23, torch.float16: 113 << 23, torch.float32: 27 << 23}


class Bracket(NamedTuple):
    """The codes base .. base + span, sign included, among which W must be; 0, 0 if too many."""

    base: Tensor
    span: Tensor


def codes(values: Tensor) -> Tensor:
    """Bit patterns as int64, row-major, flat; unsigned but for float64."""
    values = values.contiguous().flatten()
    if values.dtype == torch.float64:
        return values.view(torch.int64)
    integer = torch.int32 if values.dtype == torch.float32 else torch.int16
    return values.view(integer).to(torch.int64) & (MASK >> (32 - 8 * values.element_size()))


def from_codes(code: Tensor, like: Tensor) -> Tensor:
    """The values with these bit patterns, in the dtype and shape of `like`."""
    if like.dtype != torch.float64:
        integer = torch.int32 if like.dtype == torch.float32 else torch.int16
        code = signed(code, 8 * like.element_size()).to(integer)
    return code.view(like.dtype).view(like.shape)


def signed(code: Tensor, bits: int) -> Tensor:
    """Codes as the signed integers that torch stores."""
    return torch.where(code >= 1 << (bits - 1), code - (1 << bits), code)


def _float(code: Tensor) -> Tensor:
    return signed(code, 32).to(torch.int32).view(torch.float32)


def _exponent(noisy: Tensor, dtype: torch.dtype) -> Tensor:
    """2^E as a float32 code, E the exponent of S but at least the dtype's E_min."""
    return (codes(noisy) & _EXPONENT).clamp_min(_MIN_EXPONENT[dtype])


def _truncate(code: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 magnitude's code rounded towards zero to a 16-bit dtype."""
    if dtype == torch.bfloat16:
        return code >> 16
    large = torch.where(code < _EXPONENT, 0x7BFF, 0x7C00)
    normal = (code - 0x38000000) >> 13
    # Below the smallest normal number, 2^-14, codes count steps of 2^-24.
    denormal = (_float(code.clamp(0, 0x38800000)) * 2.0**24).to(torch.int64)
    return torch.where(code >= 0x47800000, large, torch.where(code < 0x38800000, denormal, normal))


def _narrow(low: Tensor, base: Tensor, top: Tensor, sign: Tensor, possible: Tensor) -> Bracket:
    """Wide brackets, and those that reach zero, become 0, 0: pruned weights take no bits."""
    span = (top - base) & MASK
    keep = possible & (low > 0) & (span < 256)
    return Bracket(torch.where(keep, sign | base, 0), torch.where(keep, span, 0))


def bracket(noisy: Tensor, e: Tensor, elementwise: bool) -> Bracket:
    """Where |W| must be if S = round(W + e), or round(W + e |W|): flat, for every element.

    Args:
        noisy: S, float32 (not elementwise), bfloat16 or float16.
        e: c_i z_ij in float32, of the same shape.
        elementwise: see `perturb`.
    """
    dtype, s, e = noisy.dtype, noisy.float().flatten(), e.flatten()
    exponent, p = _exponent(noisy.float(), dtype), _PRECISION[dtype]
    if dtype == torch.float32:
        return _bracket_float32(s, e, _float(exponent - (p << 23)))
    possible = torch.ones_like(s, dtype=torch.bool)
    # Half a gap of S and two float32 ulps; elementwise rounds twice more.
    half = _float(exponent - (p << 23) + (1 << (p + 1 + elementwise)))
    if elementwise:
        factor = 1.0 + torch.where(torch.signbit(s), -e, e)
        possible = factor > 1.0 / 16.0
        inverse = 1.0 / factor
        size, half, negative = s.abs() * inverse, half * inverse, torch.signbit(s)
    else:
        before = s - e
        size, negative = before.abs(), torch.signbit(before)
    low, high = size - half, size + half
    base = _truncate((codes(low) - 1).clamp(0, _EXPONENT), dtype) + 1
    top = _truncate(codes(high) & 0x7FFFFFFF, dtype)
    return _narrow(low, base, top, torch.where(negative, 0x8000, 0), possible)


def _bracket_float32(s: Tensor, e: Tensor, half: Tensor) -> Bracket:
    """float32 has no spare bits: the exact error of S - e, and the tie rule."""
    before = s - e
    negative = torch.signbit(before)
    error = (s - before) - e
    error, size = torch.where(negative, -error, error), before.abs()
    odd = codes(s) & 1 == 1
    down, up = error - half, error + half
    low, high = size + down, size + up
    below, above = down - (low - size), up - (high - size)
    base = codes(low) + ((below > 0) | ((below == 0) & odd)).long()
    top = codes(high) - ((above < 0) | ((above == 0) & odd)).long()
    sign = torch.where(negative, 0x80000000, 0)
    return _narrow(low, base, top, sign, torch.ones_like(odd))


def round_to_grid(noisy: Tensor, e: Tensor, grid: Tensor) -> Tensor:
    """S - e rounded half-up, in code space, to a multiple of 2^grid."""
    before = noisy.flatten() - e.flatten()
    rounded = (((codes(before) + (1 << (grid - 1))) & MASK) >> grid) << grid
    return torch.where(before == 0, 0, rounded)


def width_of(span: Tensor) -> Tensor:
    """Bits that hold a number up to `span` < 256."""
    table = torch.tensor([n.bit_length() for n in range(256)], device=span.device)
    return table[span]
