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
# Left alone ptxas takes 246 registers, and one program has a processor to itself. Held to 128, what
# spills is in the loop for scales at the ends of float32.
MERGED_OPTIONS = {**NORM_OPTIONS, "maxnreg": 128}
# A program of 32 such rows on each of 132 processors holds 35 MB, of an H100's 50 MB of L2.
ONE_PASS_ROW_BYTES = 8192


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


@dataclass(frozen=True)
class ProductTile:
    """What one program of a product with noise covers, and into how many it is cut."""

    tokens: int
    outputs: int  # rows of the weight; columns in the backward product
    depth: int  # of the reduction, in one step
    splits: int  # of the reduction, each with a partial sum of its own
    steps: int  # of a split


PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
# A program makes its part of the noise for all its tokens at once: the more tokens, the less noise.
PRODUCT_TOKENS = (64, 128, 256)
PRODUCT_SIDE = 64
SUM_BLOCK = 1024


def product_tile(tokens: int, outputs: int, reduction: int) -> ProductTile:
    """The tile of x W_noisy^T or dY W_noisy, a function of the shape alone.

    Few outputs leave processors idle, so that the reduction is split too; the more so the fewer
    tokens there are, as partial sums cost tokens x outputs. Sums are then added in order.
    """
    block = next((size for size in PRODUCT_TOKENS if tokens <= size), PRODUCT_TOKENS[-1])
    programs = -(-tokens // block) * -(-outputs // PRODUCT_SIDE)
    tiles = max(-(-reduction // PRODUCT_SIDE), 1)
    wanted = 256 if block < 256 else 128
    splits = min(max(wanted // programs, 1), 8, tiles)
    steps = -(-tiles // splits)
    return ProductTile(block, PRODUCT_SIDE, PRODUCT_SIDE, -(-tiles // steps), steps)


# Not a function of the weight's shape, which would change the order of a row's sum. Its rows share
# one split of A into parts; its columns keep the registers of both tiles in bounds.
NORM_TILE = NormTile(32, 1024 if INTERPRETED else 128)


def adapters(rank: int) -> str:
    """The form of the row norm's kernel: 16 ranks are one product of tiles."""
    if rank == 0:
        return "none"
    return "one chunk" if rank <= 16 else "chunks"


def merged_vectors() -> int:
    """Vectors side by side that give each thread of a one-pass kernel one of them."""
    return THREADS // WARPS * NORM_WARPS // NORM_TILE.rows


def fits_one_pass(weight: Tensor) -> bool:
    """Whether the rows that all programs hold at a time stay in L2 from the norm to the noise."""
    return weight.shape[1] * weight.element_size() <= ONE_PASS_ROW_BYTES


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
