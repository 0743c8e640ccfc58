"""The exact residual in plain PyTorch: what noise takes from a weight, in few bits.

The noisy weight S and the noise e leave a short range that must hold |W|. Both sides compute it,
and the residual keeps W's index in it, in as many bits as the range needs: mostly none. What the
range misses is listed. Chunks of 4096 elements share a pool of 32-bit words.

Codes are bit patterns, held in int64. A chunk's elements are adjacent in row-major order, so that
every array here is flat and `chunk` says which chunk an element belongs to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.reference.bracket import (
    MASK,
    bracket,
    codes,
    from_codes,
    round_to_grid,
    signed,
    width_of,
)

CHUNK = 4096
HEADER_BYTES = 128
CLEAN, PACKED, GRID, RAW = range(4)
MAX_OFFSET = 1 << 30

_CHECK = 0x9E3779B1
_GRID_BITS = 8, 16


@dataclass(frozen=True)
class Layout:
    """Where the residual of a [rows, cols] weight keeps what; sizes in bytes unless said."""

    rows: int
    cols: int
    itemsize: int

    @property
    def rows_per_chunk(self) -> int:
        """Whole rows of short rows; otherwise part of one."""
        return 1 if self.cols >= CHUNK or self.cols == 0 else CHUNK // self.cols

    @property
    def chunks_per_row(self) -> int:
        """Chunks that a row is cut into; 1 where a chunk holds several rows."""
        return -(-self.cols // CHUNK)

    @property
    def chunks(self) -> int:
        """Chunks of the weight."""
        return -(-self.rows // self.rows_per_chunk) * self.chunks_per_row

    @property
    def pool_begin(self) -> int:
        """The pool, behind the header and the directory of four bytes a chunk."""
        return HEADER_BYTES + -(-4 * self.chunks // 16) * 16

    def raw_words(self, count):
        """Words of `count` elements in mode RAW: the check word, then W."""
        return 1 + (count * self.itemsize + 3) // 4

    @property
    def worst_case(self) -> int:
        """Words of a pool that holds every chunk raw."""
        if self.cols >= CHUNK:
            last = self.cols - (self.chunks_per_row - 1) * CHUNK
            return self.rows * (
                (self.chunks_per_row - 1) * self.raw_words(CHUNK) + self.raw_words(last)
            )
        whole = self.rows // self.rows_per_chunk * self.chunks_per_row
        rest = self.rows % self.rows_per_chunk * self.cols
        words = whole * self.raw_words(self.rows_per_chunk * self.cols)
        return words + (self.raw_words(rest) if rest else 0)

    def counts(self, device: torch.device) -> Tensor:
        """Elements of each chunk, int64 [chunks]."""
        if self.cols >= CHUNK:
            begin = torch.arange(self.chunks_per_row, device=device) * CHUNK
            return (self.cols - begin).clamp_max(CHUNK).repeat(self.rows)
        if self.chunks == 0:
            return torch.zeros(0, dtype=torch.int64, device=device)
        row = torch.arange(self.chunks, device=device) * self.rows_per_chunk
        return (self.rows - row).clamp_max(self.rows_per_chunk) * self.cols


def _sum(values: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """Sum over the elements of each chunk."""
    return values.new_zeros(chunks).index_add_(0, chunk, values)


def _common_zeros(code: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """Low bits that are zero in every code of a chunk, at most 16."""
    grid = torch.zeros(chunks, dtype=torch.int64, device=code.device)
    for bits in range(1, _GRID_BITS[1] + 1):
        violators = _sum((code & ((1 << bits) - 1) != 0).long(), chunk, chunks)
        grid += violators == 0
    return grid


class _Chunked:
    """The flat elements of a weight by chunk."""

    def __init__(self, weight: Tensor, residual: Tensor) -> None:
        self.layout = Layout(*weight.shape, weight.element_size())
        device, self.chunks = weight.device, self.layout.chunks
        self.counts = self.layout.counts(device)
        first = self.counts.cumsum(0) - self.counts
        self.of = torch.repeat_interleave(self.counts)
        self.position = torch.arange(weight.numel(), device=device) - first[self.of]
        words = residual.view(torch.int32)
        begin = HEADER_BYTES // 4
        self.directory = words[begin : begin + self.chunks]
        self.pool = words[self.layout.pool_begin // 4 :]
        self.header = words[:begin]
        self.raw_words = self.layout.raw_words(self.counts)

    def sum(self, values: Tensor) -> Tensor:
        return _sum(values.long(), self.of, self.chunks)

    def check(self, code: Tensor) -> Tensor:
        """The check word of each chunk of S."""
        if self.layout.itemsize == 8:
            code = (code ^ (code >> 32)) & MASK
        mixed = self.sum((code * (2 * self.position + 1)) & MASK)
        return ((mixed & MASK) * _CHECK) & MASK

    def before(self, values: Tensor) -> Tensor:
        """Sum over the earlier elements of the same chunk."""
        running = values.cumsum(0) - values
        total = self.sum(values)
        return running - (total.cumsum(0) - total)[self.of]

    def report(self, word: int, value: int) -> None:
        """Write a counter of the header."""
        self.header[word] = value - (1 << 32) if value >= 1 << 31 else value


def encode(weight: Tensor, noisy: Tensor, e: Tensor, elementwise: bool, residual: Tensor) -> Tensor:
    """Fill the residual; returns `noisy` but for the chunks that the pool had no room for.

    Args:
        weight: W, [m, n].
        noisy: S, of the same dtype and shape.
        e: c_i z_ij in float32, [m, n].
        elementwise: see `perturb`.
        residual: uint8, see `flatkern.ops.new_residual`; directory, pool and counters are written.
    """
    at = _Chunked(weight, residual)
    code, pool = codes(weight), at.pool
    mode = torch.full_like(at.counts, RAW)
    words = at.raw_words
    low_half = stream_words = torch.zeros_like(words)
    field = width = torch.zeros_like(code)
    listed = torch.zeros_like(code, dtype=torch.bool)
    entry = 2 if weight.dtype == torch.float32 else 1
    packs = weight.dtype != torch.float64 and not (elementwise and weight.dtype == torch.float32)
    if packs:
        base, span = bracket(noisy, e, elementwise)
        index = (code - base) & MASK
        listed = index > span
        field, width = torch.where(listed, 0, index), width_of(span)
        low_half = at.sum(width)
        stream_words = (low_half + 31) // 32
        packed_words = 2 + stream_words + entry * at.sum(listed)
        if weight.dtype == torch.float32:
            grid = _common_zeros(code, at.of, at.chunks)
            missed = round_to_grid(noisy, e, grid.clamp_min(1)[at.of]) != code
            grid_words = 2 + entry * at.sum(missed)
            on_grid = (grid >= _GRID_BITS[0]) & (grid_words < packed_words)
            mode = torch.where(on_grid, GRID, PACKED)
            listed = torch.where(on_grid[at.of], missed, listed)
            width = torch.where(on_grid[at.of], 0, width)
            low_half = torch.where(on_grid, grid, low_half)
            stream_words = torch.where(on_grid, 0, stream_words)
            packed_words = torch.where(on_grid, grid_words, packed_words)
        else:
            mode = torch.full_like(at.counts, PACKED)
        smaller = packed_words < at.raw_words
        mode = torch.where(smaller, mode, RAW)
        words = torch.where(smaller, packed_words, at.raw_words)

    offset = words.cumsum(0) - words
    fits = (offset + words <= len(pool)) & (offset < MAX_OFFSET)
    mode = torch.where(fits, mode, CLEAN)
    payload = torch.zeros_like(pool, dtype=torch.int64)
    check = at.check(codes(noisy))
    short = (mode == PACKED) | (mode == GRID)
    payload[offset[short]] = (low_half | at.sum(listed) << 16)[short]
    payload[(offset + short)[fits]] = check[fits]

    # Fields end to end, low bit first; a field may lie across two words.
    stream = (mode == PACKED)[at.of] & (width > 0)
    bit = at.before(width)
    shifted = field << (bit & 31)
    word = (offset + 2)[at.of] + (bit >> 5)
    payload.index_add_(0, word[stream], (shifted & MASK)[stream])
    across = stream & (shifted > MASK)
    payload.index_add_(0, word[across] + 1, (shifted >> 32)[across])

    listed &= short[at.of]
    word = (offset + 2 + stream_words)[at.of] + entry * at.before(listed.long())
    word, position, value = word[listed], at.position[listed], code[listed]
    payload[word] = position if entry == 2 else position << 16 | value
    if entry == 2:
        payload[word + 1] = value

    raw = (mode == RAW)[at.of]
    first = (offset + 1)[at.of][raw]
    _put_raw(payload, first, at.position[raw], code[raw], at.layout.itemsize)

    pool.copy_(signed(payload, 32))
    at.directory.copy_(signed(torch.where(fits, offset << 2 | mode, 0), 32))
    asked = int(words.sum())
    at.report(20, asked & MASK)
    at.report(21, asked >> 32)
    at.report(22, int((~fits).sum()))
    at.report(24, 0)
    return torch.where(fits[at.of].view(weight.shape), noisy, weight)


def _put_raw(payload, first, position, code, itemsize):
    if itemsize == 2:
        payload.index_add_(0, first + position // 2, code << 16 * (position % 2))
    elif itemsize == 4:
        payload[first + position] = code
    else:
        payload[first + 2 * position] = code & MASK
        payload[first + 2 * position + 1] = (code >> 32) & MASK


def _get_raw(payload, first, position, itemsize):
    if itemsize == 2:
        return (payload[first + position // 2] >> 16 * (position % 2)) & 0xFFFF
    if itemsize == 4:
        return payload[first + position]
    return payload[first + 2 * position] | payload[first + 2 * position + 1] << 32


def decode(noisy: Tensor, e: Tensor, elementwise: bool, residual: Tensor) -> tuple[Tensor, Tensor]:
    """W, and which chunks do not hold the S that the residual was filled for: those keep S.

    Args:
        noisy: S, [m, n].
        e: c_i z_ij in float32, [m, n].
        elementwise: see `perturb`.
        residual: uint8, filled by `encode`; read.

    Returns:
        (W, refused): of the dtype and shape of `noisy`; bool [chunks].
    """
    at = _Chunked(noisy, residual)
    after = codes(noisy)
    entry = at.directory.long() & MASK
    mode, offset = entry & 3, entry >> 2
    # Zeros behind the pool, so that no payload is read beyond it.
    pool = torch.cat([at.pool.long() & MASK, at.pool.new_zeros(3 * CHUNK, dtype=torch.int64)])
    offset = offset.clamp_max(len(at.pool))
    short = (mode == PACKED) | (mode == GRID)
    head = torch.where(short, pool[offset], 0)
    low_half, missed = head & 0xFFFF, head >> 16
    refused = (mode != CLEAN) & (pool[offset + short] != at.check(after))
    code = after.clone()
    if bool(short.any()):
        base, span = bracket(noisy, e, elementwise)
        width = torch.where((mode == PACKED)[at.of], width_of(span), 0)
        bits = at.sum(width)
        refused |= (mode == PACKED) & (bits != low_half)
        bit = at.before(width)
        word = (offset + 2)[at.of] + (bit >> 5)
        pair = torch.where(width > 0, pool[word] | pool[word + 1] << 32, 0)
        field = (pair >> (bit & 31)) & ((1 << width) - 1)
        code = torch.where((mode == PACKED)[at.of], base + field, code)
        if noisy.dtype == torch.float32:
            on_grid = (mode == GRID)[at.of]
            grid = torch.where(mode == GRID, low_half, 1).clamp(1, _GRID_BITS[1])
            code = torch.where(on_grid, round_to_grid(noisy, e, grid[at.of]), code)
        _apply_lists(at, code, pool, offset + 2 + (bits + 31) // 32, missed, refused)
    raw = (mode == RAW)[at.of]
    first = (offset + 1)[at.of][raw]
    code[raw] = _get_raw(pool, first, at.position[raw], at.layout.itemsize)
    return from_codes(torch.where(refused[at.of], after, code), noisy), refused


def holds(noisy: Tensor, residual: Tensor) -> Tensor:
    """Which chunks are the S that the residual was filled for; bool [chunks]."""
    at = _Chunked(noisy, residual)
    entry = at.directory.long() & MASK
    mode, offset = entry & 3, (entry >> 2).clamp_max(len(at.pool))
    pool = torch.cat([at.pool.long() & MASK, at.pool.new_zeros(2, dtype=torch.int64)])
    short = (mode == PACKED) | (mode == GRID)
    return (mode != CLEAN) & (pool[offset + short] == at.check(codes(noisy)))


def _apply_lists(at, code, pool, begin, listed, refused):
    """Overwrite what the brackets missed; a position outside its chunk refuses the chunk."""
    two = at.layout.itemsize == 4
    chunk = torch.repeat_interleave(torch.where(refused, 0, listed.clamp_max(CHUNK)))
    which = torch.arange(len(chunk), device=chunk.device)
    which -= torch.searchsorted(chunk, chunk)
    word = begin[chunk] + which * (1 + two)
    position = pool[word] if two else pool[word] >> 16
    value = pool[word + 1] if two else pool[word] & 0xFFFF
    inside = position < at.counts[chunk]
    refused[chunk[~inside]] = True
    first = at.counts.cumsum(0) - at.counts
    code[(first[chunk] + position)[inside]] = value[inside]


def settle(residual: Tensor, weight: Tensor, refused: Tensor) -> None:
    """After a restore: what was restored is marked clean, so that a second try goes on from it."""
    at = _Chunked(weight, residual)
    at.directory.masked_fill_(~refused, 0)
    at.report(24, int(refused.sum()))
