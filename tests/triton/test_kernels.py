"""Triton's kernels, interpreted, in the launch shapes that a GPU gets.

tests/ops run interpreted too, but with tiles so large that a matrix of a test's size takes the
masked paths alone. Here the tiles are the real ones, so that the loops over whole tiles run, chunks
meet and blocks of rows end early.
"""

import itertools

import oracle
import pytest
import tolerances
import torch

import flatkern
from flatkern import _machine

if not _machine.TRITON_INTERPRETED:
    pytest.skip("test_interpreted.py runs this with TRITON_INTERPRET=1", allow_module_level=True)

from flatkern.triton import _launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = (3, 14, 15, 92)
# Whole rows of 16-byte vectors in every dtype, of no dtype, and a group cut by the first column.
# The first fills the loop without masks at least once, then whole tiles and a part of one.
COLS = [(1416, 0), (645, 0), (1056, 8), (646, 3)]


@pytest.fixture(autouse=True)
def triton():
    with flatkern.backend("triton"):
        yield


@pytest.fixture
def real_tiles(monkeypatch):
    monkeypatch.setattr(_launch, "THREADS", 128)
    monkeypatch.setattr(_launch, "NORM_TILE", _launch.NormTile(32, 128))


def make_key(key=KEY):
    return flatkern.NoiseKey(*key).to("cpu")


def make(rows, cols, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    scale = 0.02 * 10 ** (torch.rand(rows, generator=generator) * 4 - 3)
    return weight.to(dtype), scale


def in_other_tiles(monkeypatch, call):
    """What `call` gives in the interpreter's own large tiles."""
    with monkeypatch.context() as patch:
        patch.setattr(_launch, "THREADS", 8192)
        patch.setattr(_launch, "CHUNK", 16384)
        return call()


@pytest.mark.parametrize(("cols", "col_offset"), COLS)
def test_words_and_normals(real_tiles, cols, col_offset):
    offsets = {"row_offset": 2**32 - 5, "col_offset": 2**33 + col_offset}
    words = flatkern.ops.philox_bits(5, cols, make_key(), **offsets)
    expected = oracle.words(5, cols, KEY, **offsets)
    assert torch.equal(words, torch.from_numpy(expected.astype("int64")))
    u = flatkern.ops.uniform(5, cols, make_key(), **offsets)
    exact = (torch.from_numpy(expected.astype("int64")) >> 8).double() * 2.0**-23 + 2.0**-24 - 1
    assert torch.equal(u.double(), exact)
    z = flatkern.ops.noise(5, cols, make_key(), **offsets)
    exact = torch.from_numpy(oracle.normals(5, cols, KEY, **offsets))
    tolerances.assert_within(z, exact, tolerances.NOISE_BULK)


def test_normals_at_chosen_words():
    """One launch for all keys would need other keys: a few of tests/ops' words, the ends of u."""
    for first, second in itertools.product(((0, 1), (2**32 - 1, 2**31)), ((1, 0), (2**24, 7))):
        words = (*first, *second)
        row, block, tensor, draw = oracle.philox_inverse(words, KEY[:2])
        offsets = {"row_offset": row, "col_offset": 4 * block}
        z = flatkern.ops.noise(1, 4, make_key((*KEY[:2], draw, tensor)), **offsets)[0]
        pairs = (oracle.box_muller(*pair) for pair in (first, second))
        exact = torch.tensor([float(x) for pair in pairs for x in pair], dtype=torch.float64)
        tolerances.assert_within(z, exact, tolerances.NOISE_REFERENCE)


def noisy(weight, scale, elementwise, lower=None, **offsets):
    """perturb_, then restore_ of the result; perturb to a lower dtype."""
    key = make_key()
    if lower is not None:
        return (
            flatkern.ops.perturb(
                weight, scale, key, dtype=lower, elementwise=elementwise, **offsets
            ),
        )
    perturbed = weight.clone()
    flatkern.ops.perturb_(perturbed, scale, key, elementwise=elementwise, **offsets)
    restored = perturbed.clone()
    flatkern.ops.restore_(restored, scale, key, elementwise=elementwise, **offsets)
    return perturbed, restored


# Every pair of dtypes, of which equal ones are in place, and elementwise those and one cast.
@pytest.mark.parametrize(
    ("dtype", "lower", "elementwise"),
    [(dtype, None if lower == dtype else lower, False) for dtype in DTYPES for lower in DTYPES]
    + [(dtype, None, True) for dtype in DTYPES]
    + [(torch.float32, torch.bfloat16, True)],
)
def test_real_tiles_have_the_bits_of_large_ones(real_tiles, monkeypatch, dtype, lower, elementwise):
    # Of each pair of dtypes every geometry, of each form aligned rows and others.
    geometries = [(5, *COLS[0]), (3, *COLS[3])] if elementwise else [(4, *COLS[1]), (9, *COLS[2])]
    for rows, cols, col_offset in geometries:
        weight, scale = make(rows, cols, dtype)
        # Rows at the ends of float32 take the other path, and take their tile along.
        scale[1] = 1e-39
        scale[2] = 3e38
        offsets = {"row_offset": 2**31 - 2, "col_offset": 2**33 + col_offset}

        def call(weight=weight, scale=scale, offsets=offsets):
            return noisy(weight, scale, elementwise, lower, **offsets)

        expected = in_other_tiles(monkeypatch, call)
        # Chunks of one iteration, so that several programs share a row; one dtype also as launched.
        for chunk in (16384, 1) if lower is None and dtype == torch.bfloat16 else (1,):
            monkeypatch.setattr(_launch, "CHUNK", chunk)
            for got, other in zip(call(), expected, strict=True):
                tolerances.assert_same_bits(got, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_of_e_and_one_rounding(real_tiles, dtype):
    weight, scale = make(6, 2304, dtype)
    scale[1], scale[4] = 3e-39, 1e30
    expected = oracle.perturbed(weight, scale, torch.from_numpy(oracle.normals(6, 2304, KEY)))
    got = flatkern.ops.perturb(weight, scale, make_key())
    bound = 2e-6 * scale[:, None].double() + tolerances.ulp(expected, dtype)
    tolerances.assert_within(got, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_its_neighbours(real_tiles, dtype):
    weight, scale = make(8, 1056, dtype)
    scale[3], scale[5] = 1e-42, -2e38
    key = make_key()
    together = flatkern.ops.perturb(weight, scale, key)
    for row in (0, 3, 5, 7):
        alone = flatkern.ops.perturb(
            weight[row : row + 1], scale[row : row + 1], key, row_offset=row
        )
        tolerances.assert_same_bits(alone, together[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays(real_tiles, dtype):
    """In the middle of whole vectors, in the loop without masks."""
    weight, scale = make(4, 1024, dtype)
    clean = flatkern.ops.perturb(weight, scale, make_key())
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    nan = torch.tensor(float("nan")).to(dtype).view(integer)
    negative = nan + torch.iinfo(integer).min
    special = torch.stack([nan + 1, negative, *torch.tensor([1e39, -1e39]).to(dtype).view(integer)])
    weight[1:3, 700:704] = special.view(dtype)
    scale[3] = float("nan")
    got = flatkern.ops.perturb(weight, scale, make_key())
    tolerances.assert_same_bits(got[1:3, 700:704], weight[1:3, 700:704])
    assert torch.equal(got[3], weight[3])
    changed = torch.zeros(4, 1024, dtype=torch.bool)
    changed[1:3, 700:704], changed[3] = True, True
    tolerances.assert_same_bits(got[~changed], clean[~changed])


def adapters(rows, cols, rank):
    generator = torch.Generator().manual_seed(rank)
    lora_A = torch.randn(rank, cols, generator=generator) * 0.1
    return lora_A, torch.randn(rows, rank, generator=generator) * 0.1


@pytest.mark.parametrize("rank", [0, 16, 40, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms(real_tiles, dtype, rank):
    for rows, cols in ((35, 1160), (3, 131)):
        weight, _ = make(rows, cols, dtype)
        lora = adapters(rows, cols, rank)
        got = flatkern.ops.row_norm(weight, *lora, 2.0)
        bound = tolerances.row_norm_bound(oracle.row_norm_scale(weight, *lora, 2.0), rank)
        tolerances.assert_within(got, oracle.row_norm(weight, *lora, 2.0), bound)


@pytest.mark.parametrize("rank", [0, 16])
def test_rows_beyond_the_squares_of_float32_stand_among_others(real_tiles, rank):
    weight, _ = make(34, 300, torch.float32)
    lora_A, lora_B = adapters(34, 300, rank)
    clean = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    for row, size in ((1, 1e-30), (2, 1e30), (33, 0.0)):
        weight[row] *= size
        lora_B[row] *= size
    got = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    exact = oracle.row_norm(weight, lora_A, lora_B, 2.0)
    tolerances.assert_within(got, exact, 1e-6 * exact)
    kept = [row for row in range(34) if row not in (1, 2, 33)]
    torch.testing.assert_close(got[kept], clean[kept], rtol=tolerances.NORM_OTHER_ORDER, atol=0)


ROW_STRIDE = 2**33


@pytest.fixture
def far_rows(tmp_path, monkeypatch):
    """Two rows 2**33 elements apart in a sparse file of which a few pages are touched."""
    from triton.runtime.interpreter import GridExecutor

    path, size = tmp_path / "sparse", ROW_STRIDE + 4096
    with open(path, "wb") as file:
        file.truncate(2 * size)
    if path.stat().st_blocks > 1024:
        pytest.skip("the file system keeps no sparse files")
    try:
        storage = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"16 GiB of address space cannot be mapped: {error}")
    # The interpreter works on CPU memory itself, then copies all of it onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    return lambda first: storage[first:].as_strided((2, 1032), (ROW_STRIDE, 1))


@pytest.mark.parametrize("first", [1024, 1025], ids=["aligned", "unaligned"])
def test_rows_more_than_2_to_the_31_elements_apart(real_tiles, far_rows, first):
    values, scale = make(2, 1032, torch.bfloat16)
    weight, key = far_rows(first), make_key()
    weight.copy_(values)
    flatkern.ops.perturb_(weight, scale, key)
    tolerances.assert_same_bits(weight, flatkern.ops.perturb(values, scale, key))
    weight.copy_(values)
    norms = flatkern.ops.row_norm(values)
    tolerances.assert_same_bits(flatkern.ops.row_norm(weight), norms)
    c = flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key)
    flatkern.ops.perturb_(values, c, key)
    tolerances.assert_same_bits(weight, values)
    outside = far_rows(0)
    assert (outside[:, :1024] == 0).all()
