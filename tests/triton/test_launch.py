"""Launch shapes: every element is covered once, whatever the matrix."""

import pytest
import torch

from flatkern.triton import _launch

SIZES = [1, 3, 4, 7, 8, 31, 64, 127, 256, 1000, 1024, 4096, 11008, 16384, 16385, 300_000]


@pytest.fixture(autouse=True)
def real_threads(monkeypatch):
    monkeypatch.setattr(_launch, "THREADS", 128)


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("cols", [*SIZES, 2**31 + 5, 2**34])
def test_tiles_cover_a_matrix(cols, width):
    tile = _launch.elementwise_tile(cols, width)
    assert tile.rows * tile.vectors == 128
    assert tile.chunk == tile.tiles * tile.vectors * width
    for rows in (1, 5, 4096, 2**31):
        blocks, chunks = _launch.elementwise_grid(rows, cols, tile)
        assert blocks * tile.rows >= rows > (blocks - 1) * tile.rows
        assert chunks * tile.chunk >= cols > (chunks - 1) * tile.chunk
        assert chunks <= 65535
        assert tile.chunk < 2**31, "columns of a chunk are counted in 32 bits"


@pytest.mark.parametrize("width", [4, 8])
def test_a_warp_stays_in_a_row_that_fills_it(width):
    assert _launch.elementwise_tile(32 * width, width).vectors == 32
    assert _launch.elementwise_tile(2**20, width).vectors == 32
    assert _launch.elementwise_tile(5, width).vectors == 8


def test_a_matrix_of_few_rows_is_shared_by_many_programs():
    tile = _launch.elementwise_tile(2**20, 8)
    assert _launch.elementwise_grid(8, 2**20, tile) == (2, 64)


@pytest.mark.parametrize("value", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5])
def test_words_are_signed_numbers_of_the_same_bits(value):
    word = _launch.word(value)
    assert -(2**31) <= word < 2**31
    assert word % 2**32 == value % 2**32


def test_aligned():
    matrix = torch.empty(8, 64, dtype=torch.bfloat16)
    assert _launch.aligned(8, 64, 0, matrix)
    assert _launch.aligned(8, 56, 2**33 + 8, matrix[:, 8:])
    assert not _launch.aligned(8, 60, 0, matrix[:, 4:]), "the first element"
    assert not _launch.aligned(8, 60, 0, matrix[:, :60]), "the number of columns"
    assert not _launch.aligned(8, 64, 4, matrix), "the first group of a vector"
    odd = torch.empty(8, 68, dtype=torch.bfloat16)[:, :64]
    assert not _launch.aligned(8, 64, 0, odd), "the second row"
    assert _launch.aligned(8, 64, 0, odd[:1])
    assert not _launch.aligned(8, 64, 0, matrix, odd)


@pytest.mark.parametrize(
    ("rank", "together"), [(0, 0), (1, 16), (16, 16), (17, 32), (48, 64), (64, 64), (65, 64)]
)
def test_ranks_of_a_row_norm(rank, together):
    assert _launch.norm_ranks(rank) == together
