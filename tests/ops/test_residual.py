"""The exact residual: every bit comes back, in few bits, or nothing is written."""

import pytest
import tolerances
import torch
from residuals import (
    constant,
    gaussian,
    make_key,
    modes,
    parse,
    refused,
    round_trip,
)

from flatkern import ops
from flatkern.reference import residual as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OFFSETS = {"row_offset": 2**32 - 9000, "col_offset": 2**33 + 7}
COLUMNS = [1, 7, 8, 1000, 4095, 4096, 4097, 11008]


@pytest.fixture(autouse=True)
def has_residual(request):
    if "implementation" in request.fixturenames:
        implementation = request.getfixturevalue("implementation")
        if not implementation.residual:
            pytest.skip(f"{implementation.name} has no residual")


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLUMNS)
def test_every_width(device, cols, dtype, elementwise):
    key = make_key(device)
    rows = [1, 3] if cols > 1000 else [1, 3, 4096 // cols, 4096 // cols + 1, 9000 // cols]
    for m in rows:
        weight = gaussian((m, cols), dtype, device, seed=m)
        scale = torch.logspace(-4, -1, m, device=device)
        filled = round_trip(weight, scale, key, elementwise=elementwise, **OFFSETS)
        # Chunks are 4096 columns of a row, or whole rows that fit into 4096 elements.
        per_chunk = max(4096 // cols, 1)
        assert len(parse(filled, weight).modes) == -(-m // per_chunk) * -(-cols // 4096)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5,), (5000,), (4, 3, 7, 7), (2, 8, 30, 30), (0,), (0, 8), (8, 0), (0, 3, 3)], ids=str
)
def test_every_shape(device, shape, dtype):
    weight = gaussian(shape, dtype, device)
    round_trip(weight, constant(weight, 0.003), make_key(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [40, 5000])
def test_slices_leave_their_neighbours_alone(device, cols, dtype):
    storage = gaussian((6, cols + 9), dtype, device)
    before = storage.clone()
    view, key = storage[:, 3 : cols + 3], make_key(device)
    scale, residual = constant(view, 0.01), ops.new_residual(view)
    ops.perturb_(view, scale, key, residual=residual)
    tolerances.assert_same_bits(view.contiguous(), ops.perturb(before[:, 3 : cols + 3], scale, key))
    tolerances.assert_same_bits(storage[:, :3], before[:, :3])
    tolerances.assert_same_bits(storage[:, cols + 3 :], before[:, cols + 3 :])
    ops.restore_(view, scale, key, residual=residual)
    tolerances.assert_same_bits(storage, before)


def test_float64_is_raw(implementation, device):
    weight = torch.randn(3, 5000, dtype=torch.float64, device=device)
    if not implementation.float64:
        with pytest.raises(ValueError, match="float64"):
            ops.new_residual(weight)
        return
    filled = round_trip(weight, constant(weight, 0.1), make_key(device))
    assert modes(filled, weight) == {"raw": 6}


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_restored_one_by_one(device, dtype):
    weight, key = gaussian((6, 9000), dtype, device), make_key(device)
    scale = constant(weight, 0.002)
    whole = ops.perturb(weight, scale, key)
    shards = [(slice(0, 4), slice(0, 4099)), (slice(0, 4), slice(4099, 9000))]
    shards += [(slice(4, 6), slice(0, 9000))]
    work, residuals = weight.clone(), []
    for rows, cols in shards:
        offsets = {"row_offset": rows.start, "col_offset": cols.start}
        residual = ops.new_residual(work[rows, cols])
        ops.perturb_(work[rows, cols], scale[rows], key, residual=residual, **offsets)
        residuals.append((residual, offsets))
    tolerances.assert_same_bits(work, whole)
    for (rows, cols), (residual, offsets) in zip(shards, residuals, strict=True):
        ops.restore_(work[rows, cols], scale[rows], key, residual=residual, **offsets)
    tolerances.assert_same_bits(work, weight)


SIZES = {
    # sigma: bits of bfloat16, float16, float32
    0.05: (0.15, 0.14, 0.23),
    0.10: (0.23, 0.22, 0.36),
    0.15: (0.30, 0.29, 0.46),
}


@pytest.mark.parametrize("sigma", SIZES)
def test_bits_of_gaussian_weights(device, sigma):
    for dtype, most in zip(
        (torch.bfloat16, torch.float16, torch.float32), SIZES[sigma], strict=True
    ):
        weight = gaussian((128, 4096), dtype, device)
        filled = round_trip(weight, constant(weight, 0.02 * sigma), make_key(device))
        assert parse(filled, weight).total_bits <= most
        assert modes(filled, weight) == {"packed": 128}


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_float32_that_holds_16_bit_values_takes_next_to_nothing(device, held):
    weight = gaussian((64, 4096), held, device).float()
    filled = round_trip(weight, constant(weight, 0.003), make_key(device))
    assert parse(filled, weight).total_bits <= 0.03
    assert modes(filled, weight) == {"grid": 64}


def test_one_value_off_the_grid_takes_its_chunk_off(device):
    weight = gaussian((3, 4096), torch.bfloat16, device).float()
    weight[1, 77] = 0.0100001
    filled = round_trip(weight, constant(weight, 0.003), make_key(device))
    assert modes(filled, weight) == {"grid": 2, "packed": 1}


@pytest.mark.parametrize("bits", range(7, 18))
def test_grids_of_every_spacing(device, bits):
    weight = gaussian((1, 4096), torch.float32, device)
    codes = weight.view(torch.int32)
    codes &= -1 << bits
    codes[0, 9] |= 1 << bits
    filled = round_trip(weight, constant(weight, 1e-4), make_key(device))
    assert modes(filled, weight) == {"grid" if bits >= 8 else "packed": 1}
    if bits >= 8:
        assert parse(filled, weight).payloads[0][0] & 0xFFFF == min(bits, 16)


def test_grid_zeros(device):
    weight = gaussian((2, 4096), torch.bfloat16, device).float()
    weight[0, ::2] = 0
    weight[1] = 0
    filled = round_trip(weight, constant(weight, 0.003), make_key(device))
    content = parse(filled, weight)
    assert content.modes[0] == reference.GRID
    assert content.payloads[0][0] >> 16 == 0


def worst_cases(dtype):
    """(name, weight, c): what a typical weight never is."""
    g = gaussian((4, 4096), torch.float32)
    generator = torch.Generator().manual_seed(1)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    codes = torch.randint(-(2**31), 2**31, (4, 4096), generator=generator).to(integer)
    outliers = torch.where(torch.arange(4096) % 97 == 0, 30 * g, g)
    yield "zeros", torch.zeros(4, 4096), 0.1
    yield "minus zeros", -torch.zeros(4, 4096), 0.1
    yield "half zeros", torch.where(g > 0, g, 0.0), 0.003
    yield "constant", torch.full((4, 4096), 2.0**-6), 0.003
    yield "outliers", outliers, 0.003
    yield "one huge", torch.where(torch.arange(4096) == 5, 60.0, g), 0.14
    yield "tiny", g * 1e-3, 0.01
    for c in (0.0, 1e-39, 1e-3, 1.0, 3e38, float("inf"), float("nan")):
        yield f"random codes, c = {c}", codes.view(dtype), c
    sprinkled = g.to(dtype)
    sprinkled[:, ::500] = float("nan")
    sprinkled[:, 1::500] = -float("inf")
    sprinkled[:, 2::500] = -0.0
    yield "not finite, sprinkled", sprinkled, 0.001


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_worst_cases(device, dtype, elementwise):
    ceiling = 8 * torch.empty((), dtype=dtype).element_size() + 0.5
    for name, weight, c in worst_cases(dtype):
        weight = weight.to(device, dtype)
        filled = round_trip(weight, constant(weight, c), make_key(device), elementwise=elementwise)
        content = parse(filled, weight)
        assert content.total_bits <= ceiling, name
        if name == "zeros" and not (elementwise and dtype == torch.float32):
            assert content.asked == 4 * 2, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gives_way_to_raw_where_it_is_not_smaller(device, dtype):
    # Weights far below the noise are all listed; how many are is turned up from row to row.
    weight = gaussian((65, 4096), dtype, device)
    for row in range(65):
        weight[row, : 64 * row] *= 1e-4
    filled = round_trip(weight, constant(weight, 0.01), make_key(device))
    content = parse(filled, weight)
    raw_words = 1 + 4096 * weight.element_size() // 4
    assert {"packed", "raw"} == modes(filled, weight).keys()
    for mode, payload in zip(content.modes, content.payloads, strict=True):
        assert len(payload) < raw_words or mode == reference.RAW
    assert max(len(payload) for payload in content.payloads) == raw_words


def test_the_longest_stream(device):
    # Rows of one element, each with its own noise: 1.5 + 190.5 = 192 could have been anything from
    # 1 to 2, 128 codes, so that every field has 8 bits.
    weight = torch.full((4096, 1), 1.5, dtype=torch.bfloat16, device=device)
    key = make_key(device)
    scale = (190.5 / ops.noise(4096, 1, key)).flatten()
    filled = round_trip(weight, scale, key)
    content = parse(filled, weight)
    assert content.modes == [reference.PACKED]
    assert content.payloads[0][0] == 32768
    assert content.asked == 2 + 1024


def test_the_residual_is_what_the_reference_writes(implementation, device):
    """Chunk by chunk, word by word, from the implementation's own noise."""
    if implementation.folds_scale:
        pytest.skip("its e is not c z rounded once")
    if implementation.name == "reference":
        pytest.skip("it is what the others are held against")
    key = make_key(device)
    for dtype in DTYPES:
        for _, weight, c in worst_cases(dtype):
            for elementwise in (False, True):
                weight = weight.to(device, dtype)
                scale = constant(weight, c)
                filled = round_trip(weight, scale, key, elementwise=elementwise)
                noisy = ops.perturb(weight, scale, key, elementwise=elementwise)
                e = torch.where(scale.isfinite(), scale, 0.0)[:, None] * ops.noise(4, 4096, key)
                expected = torch.zeros_like(filled)
                reference.encode(weight, noisy, e, elementwise, expected)
                got, expected = parse(filled, weight), parse(expected, weight)
                assert got.payloads == expected.payloads
                assert got.modes == expected.modes


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_windows(implementation, device, dtype):
    weight = gaussian((3, 4500), dtype, device)
    work, residual = weight.clone(), ops.new_residual(weight)
    for step in range(100 if implementation.streams else 10):
        key = make_key(device, (1, step, 0, 5))
        scale = constant(weight, 0.003 * (step % 7))
        ops.perturb_(work, scale, key, residual=residual)
        ops.restore_(work, scale, key, residual=residual)
        if step % 3 == 0:
            tolerances.assert_same_bits(work, weight)
    tolerances.assert_same_bits(work, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_adapters", [False, True])
def test_perturb_merged(device, dtype, with_adapters):
    weight, key = gaussian((37, 4500), dtype, device), make_key(device)
    adapters = (None, None)
    if with_adapters:
        adapters = gaussian((4, 4500), torch.float32, device), gaussian((37, 4), dtype, device)
    work, plain, residual = weight.clone(), weight.clone(), ops.new_residual(weight)
    c = ops.perturb_merged_(plain, *adapters, 2.0, 0.1, key, row_offset=5)
    got = ops.perturb_merged_(work, *adapters, 2.0, 0.1, key, row_offset=5, residual=residual)
    tolerances.assert_same_bits(got, c)
    tolerances.assert_same_bits(work, plain)
    with refused(residual, "filled by an earlier"):
        ops.perturb_merged_(work, *adapters, 2.0, 0.1, key, row_offset=5, residual=residual)
    tolerances.assert_same_bits(work, plain)
    ops.restore_(work, c, key, row_offset=5, residual=residual)
    tolerances.assert_same_bits(work, weight)


def test_number_of_threads_does_not_matter(device, threads):
    weight, key = gaussian((101, 4500), torch.bfloat16, device), make_key(device)
    scale = constant(weight, 0.003)
    noisy = ops.perturb(weight, scale, key)
    residual = ops.new_residual(weight)
    for filling, emptying in ((1, 3), (3, 1), (2, 2)):
        work = weight.clone()
        threads(filling)
        ops.perturb_(work, scale, key, residual=residual)
        tolerances.assert_same_bits(work, noisy)
        threads(emptying)
        ops.restore_(work, scale, key, residual=residual)
        tolerances.assert_same_bits(work, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_set_flush_denormal_does_not_matter(implementation, device, dtype):
    if not implementation.ignores_flush_denormal:
        pytest.skip("runs on torch's own operations")
    weight = (torch.arange(9000, device=device).view(2, 4500) * 1e-41).to(dtype)
    if dtype == torch.float16:
        weight = (torch.arange(9000, device=device).view(2, 4500) % 999 * 2.0**-24).to(dtype)
    scale, key = constant(weight, 1e-40), make_key(device)
    residual, work, noisy = ops.new_residual(weight), weight.clone(), weight.clone()
    try:
        torch.set_flush_denormal(True)
        ops.perturb_(work, scale, key, residual=residual)
        torch.set_flush_denormal(False)
        ops.perturb_(noisy, scale, key)
        tolerances.assert_same_bits(work, noisy)
        ops.restore_(work, scale, key, residual=residual)
    finally:
        torch.set_flush_denormal(False)
    tolerances.assert_same_bits(work, weight)
