"""Philox4x32-10, Box-Muller and uniform values in plain PyTorch."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """The published generator: four counter words and two key words to four output words.

    Words are int64 tensors with values in [0, 2^32). Source: Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, which keeps all 64 bits; the shift is made logical by the mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        hi0, hi1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK, hi0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def philox_bits(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Word of each element, int64 [rows, cols]: counter (row, col // 4, tensor, draw)."""
    if rows == 0 or cols == 0:
        return key.new_empty((rows, cols))
    seed, step, draw, tensor = (key & _MASK).unbind()
    row = torch.arange(row_offset, row_offset + rows, device=key.device)[:, None]
    group_begin, group_end = col_offset // 4, -(-(col_offset + cols) // 4)
    group = torch.arange(group_begin, group_end, device=key.device)[None, :]
    row, group = torch.broadcast_tensors(row, group)
    words = philox4x32([row, group, tensor, draw], [seed, step])
    lanes = torch.stack(words, dim=-1).flatten(start_dim=1)
    begin = col_offset - 4 * group_begin
    return lanes[:, begin : begin + cols].contiguous()


def noise(rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0) -> Tensor:
    """Standard normals z, float32 [rows, cols]: Box-Muller over the words of each group of 4."""
    if rows == 0 or cols == 0:
        return key.new_empty((rows, cols), dtype=torch.float32)
    begin = col_offset // 4 * 4
    groups = -(-(col_offset + cols) // 4) - begin // 4
    words = philox_bits(rows, 4 * groups, key, row_offset=row_offset, col_offset=begin)
    a, b = words.view(rows, groups, 2, 2).unbind(-1)
    u = a.float() * 2.0**-32 + 2.0**-33
    v = torch.where(b < 2**31, b, b - 2**32).float() * 2.0**-31
    # u and v are float32 by specification; what follows is exact up to one last rounding.
    radius = torch.sqrt(-2.0 * torch.log(u.double()))
    angle = math.pi * v.double()
    z = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    z = z.float().view(rows, 4 * groups)
    return z[:, col_offset - begin : col_offset - begin + cols].contiguous()


def uniform(
    rows: int, cols: int, key: Tensor, *, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Uniform values in (-1, 1), float32 [rows, cols]: odd multiples of 2^-24, exactly."""
    words = philox_bits(rows, cols, key, row_offset=row_offset, col_offset=col_offset)
    # An odd integer below 2^24 in magnitude: neither the conversion nor the product rounds.
    return ((words >> 7 | 1) - 2**24).float() * 2.0**-24
