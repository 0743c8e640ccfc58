"""Launch shapes as pure functions, and what every launch shares. Does not import Triton."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern._machine import TRITON_INTERPRETED as INTERPRETED

WARPS = 4
# The interpreter's time goes by operations, not by lanes: it gets larger tiles.
THREADS = 8192 if INTERPRETED else 32 * WARPS
MAX_GRID_Y = 65535
# Columns of one row that a program walks at most: enough to pay for what is hoisted per row, few
# enough that a matrix of a few rows still fills a GPU.
CHUNK = 16384

# Keeps products and sums apart whatever Triton's default is: e is rounded before it is added.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

NORM_WARPS = 8
NORM_OPTIONS = {"num_warps": NORM_WARPS, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """What one program covers: a block of rows, and of each row a chunk of columns."""

    rows: int
    vectors: int  # side by side, one for each thread
    width: int  # columns of a vector
    unroll: int  # tiles in an iteration of the main loop
    iterations: int  # of the main loop, at most

    @property
    def chunk(self) -> int:
        """Columns of a row that one program covers."""
        return self.vectors * self.width * self.tiles

    @property
    def tiles(self) -> int:
        """Tiles side by side in a chunk."""
        return self.unroll * self.iterations


def elementwise_tile(cols: int, width: int) -> Tile:
    """The tile of a kernel that stores `width` columns per thread and store.

    A thread stays in one row, for which it keeps what the noise has of a row. A warp takes 32
    vectors of one row where the row has as many, and more rows where it has not.
    """
    vectors = min(max(power_of_2(-(-cols // width)), 8), THREADS // WARPS)
    rows = THREADS // vectors
    unroll = 4
    step = vectors * width * unroll
    # At least so many columns that the second grid dimension can count the chunks.
    chunk = max(CHUNK, -(-cols // MAX_GRID_Y))
    return Tile(rows, vectors, width, unroll, max(1, -(-min(chunk, cols) // step)))


def elementwise_grid(rows: int, cols: int, tile: Tile) -> tuple[int, int]:
    """Programs over blocks of rows and chunks of columns."""
    return -(-rows // tile.rows), -(-cols // tile.chunk)


@dataclass(frozen=True)
class NormTile:
    """Rows and columns of the tiles that a row norm walks."""

    rows: int
    cols: int


# Not a function of the weight's shape, which would change the order of a row's sum.
NORM_TILE = NormTile(32, 1024 if INTERPRETED else 128)


def norm_ranks(rank: int) -> int:
    """Ranks that the row norm multiplies at a time, at most 64; 0 without adapters."""
    return 0 if rank == 0 else min(max(power_of_2(rank), 16), 64)


def power_of_2(value: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(value - 1, 0).bit_length()


def store_width(dtype: torch.dtype) -> int:
    """Columns in a 128-bit store."""
    return 16 // dtype.itemsize


def aligned(width: int, cols: int, col_offset: int, *matrices: Tensor) -> bool:
    """Whether every row can be walked in whole 16-byte vectors that start on a group of 4."""
    return (
        cols % width == 0
        and col_offset % width == 0
        and all(
            matrix.data_ptr() % 16 == 0
            and (matrix.shape[0] <= 1 or matrix.stride(0) * matrix.element_size() % 16 == 0)
            for matrix in matrices
        )
    )


def word(value: int) -> int:
    """`value` mod 2^32 as a signed 32-bit number, so that every offset compiles to one kernel."""
    return (value + 2**31) % 2**32 - 2**31


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
