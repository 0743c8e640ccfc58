"""perturb, perturb_ and restore_: one rounding at a time, in place or not, nothing else written.

What is expected is float32(W) + float32(c_i * z_ij), rounded once, with z the implementation's own
noise, which test_noise.py holds against the specification.
"""

import random

import oracle
import pytest
import tolerances
import torch
import torch.nn.functional as F

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 3), (3, 1), (5, 5), (5, 7), (2, 8), (7, 9), (4, 16), (33, 129), (3, 1000)]
SHAPES += [(2, 8230), (40, 515)]
KEY = (3, 14, 15, 92)
OFFSETS = {"row_offset": 2**32 - 4500, "col_offset": 2**33 + 7}
SENTINEL = 123.0


def make(shape, dtype, device="cpu", seed=0):
    """A weight of typical size, with zeros, and a scale that reaches from far below it to above."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[torch.rand(shape, generator=generator) < 0.05] = 0
    scale = 0.02 * 10 ** (torch.rand(shape[0], generator=generator) * 4 - 3)
    return weight.to(device, dtype), scale.to(device)


def make_key(device, key=KEY):
    return flatkern.NoiseKey(*key).to(device)


def expect(weight, scale, key, *, elementwise=False, dtype=None, sign=1.0, **offsets):
    rows = oracle.as_rows(weight)
    z = flatkern.ops.noise(*rows.shape, key, **offsets).cpu()
    return oracle.perturbed(
        weight.cpu(), scale.cpu(), z, elementwise=elementwise, dtype=dtype, sign=sign
    )


def noise_size(weight, scale, elementwise):
    """What z is multiplied by."""
    if not elementwise:
        return scale
    return scale.double().view(-1, *[1] * (weight.dim() - 1)) * weight.double().abs()


def check_all_forms(implementation, weight, scale, key, *, elementwise=False, **offsets):
    """perturb, out=, in place and restore of one weight; returns the noisy weight on the CPU."""
    options = {"elementwise": elementwise, **offsets}
    original = weight.clone()
    expected = expect(weight, scale, key, **options)
    noisy = flatkern.ops.perturb(weight, scale, key, **options)
    assert noisy.is_contiguous()
    assert noisy.device == weight.device
    size = noise_size(weight, scale, elementwise)
    tolerances.assert_perturbed(implementation, noisy, expected, size)
    tolerances.assert_same_bits(weight, original)

    out = torch.full_like(weight, SENTINEL)
    assert flatkern.ops.perturb(weight, scale, key, out=out, **options) is out
    tolerances.assert_same_bits(out, noisy)
    tolerances.assert_same_bits(weight, original)

    assert flatkern.ops.perturb_(weight, scale, key, **options) is None
    tolerances.assert_same_bits(weight, noisy)

    restored = expect(noisy, scale, key, sign=-1.0, **options)
    if not elementwise:
        assert flatkern.ops.restore_(weight, scale, key, **options) is None
        tolerances.assert_perturbed(implementation, weight, restored, scale)
    return noisy.cpu()


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_once(implementation, device, shape, dtype, elementwise):
    weight, scale = make(shape, dtype, device)
    key = make_key(device)
    if elementwise:
        scale *= 20
    check_all_forms(implementation, weight.clone(), scale, key, elementwise=elementwise)
    check_all_forms(implementation, weight, scale, key, elementwise=elementwise, **OFFSETS)


def test_rounds_once_at_random_shapes_and_offsets(implementation, device):
    draw = random.Random(8)
    for trial in range(60):
        shape = draw.randrange(1, 12), draw.randrange(1, 90)
        weight, scale = make(shape, draw.choice(DTYPES), device, seed=trial)
        key = make_key(device, tuple(draw.randrange(2**32) for _ in range(4)))
        check_all_forms(
            implementation,
            weight,
            scale,
            key,
            elementwise=draw.random() < 0.3,
            row_offset=draw.choice([0, draw.randrange(2**32 - 12)]),
            col_offset=draw.choice([0, draw.randrange(64), draw.randrange(2**34 - 90)]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_has_the_standard_deviation_of_its_row(device, dtype):
    n = 20_000
    scale = torch.tensor([1e-3, 0.02, 0.5, 1.0, 30.0], device=device)
    noisy = flatkern.ops.perturb(
        torch.zeros(5, n, dtype=dtype, device=device), scale, make_key(device)
    )
    ratio = noisy.double().std(1) / scale.double()
    assert ((ratio - 1).abs() < tolerances.Z_SCORE / (2 * n) ** 0.5).all(), ratio


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_noise_is_relative_to_the_weight(device, dtype):
    n = 20_000
    weight = torch.full((3, n), 2.0, dtype=dtype, device=device)
    weight[1] = -0.25
    weight[2] = 0
    scale = torch.full((3,), 0.5, device=device)
    noisy = flatkern.ops.perturb(weight, scale, make_key(device), elementwise=True)
    std = (noisy.double() - weight.double()).std(1).cpu()
    for got, expected in zip(std[:2], (1.0, 0.125), strict=True):
        assert abs(got / expected - 1) < tolerances.Z_SCORE / (2 * n) ** 0.5
    assert (noisy[2] == 0).all()


LOWER = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize(("dtype", "lower"), LOWER, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (5, 1003)], ids=str)
def test_noise_is_added_during_the_cast(implementation, device, shape, dtype, lower, elementwise):
    weight, scale = make(shape, dtype, device)
    key = make_key(device)
    options = {"elementwise": elementwise, **OFFSETS}
    expected = expect(weight, scale, key, dtype=lower, **options)
    noisy = flatkern.ops.perturb(weight, scale, key, dtype=lower, **options)
    size = noise_size(weight, scale, elementwise)
    tolerances.assert_perturbed(implementation, noisy, expected, size)
    out = torch.empty(shape, dtype=lower, device=device)
    flatkern.ops.perturb(weight, scale, key, out=out, **options)
    tolerances.assert_same_bits(out, noisy)
    flatkern.ops.perturb(weight, scale, key, out=out, dtype=lower, **options)
    tolerances.assert_same_bits(out, noisy)


def from_bits(codes, dtype):
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limit = 1 << 8 * integer.itemsize - 1
    signed = [code - 2 * limit if code >= limit else code for code in codes]
    return torch.tensor(signed, dtype=integer).view(dtype)


EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
SIGN = {torch.float32: 1 << 31, torch.bfloat16: 1 << 15, torch.float16: 1 << 15}


def special_weights(dtype):
    """One row: quiet and signalling NaNs, infinities, the largest, denormals, both zeros."""
    inf, sign = EXPONENT[dtype], SIGN[dtype]
    one_ulp_exponent = inf & -inf
    positive = [
        *(inf, inf + 1, inf + one_ulp_exponent // 2, inf + one_ulp_exponent - 1),
        *(inf - 1, inf - 2, inf - one_ulp_exponent // 2),
        *(0, 1, 2, one_ulp_exponent - 1, one_ulp_exponent, one_ulp_exponent + 1),
        *(inf // 2, inf // 2 + 1),
    ]
    return from_bits([code + s for code in positive for s in (0, sign)], dtype)


SPECIAL_SCALES = [
    *(0.0, -0.0, 0.1, -0.25, 1.0, float("nan"), float("inf"), float("-inf")),
    *(1e-45, 1e-40, 1.2e-38, 6e-8, 65504.0, 1e30, 3e38, -3e38),
]


def scales_of_every_size(rows):
    generator = torch.Generator().manual_seed(7)
    exponent = torch.rand(rows, generator=generator, dtype=torch.float64) * 276 - 148
    return torch.exp2(exponent).float()


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code(implementation, device, dtype, elementwise):
    weight = from_bits(range(1 << 16), dtype).view(128, 512).to(device)
    key = make_key(device)
    for scale in (scales_of_every_size(128), torch.full((128,), 0.3), torch.zeros(128)):
        check_all_forms(
            implementation, weight.clone(), scale.to(device), key, elementwise=elementwise
        )


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("lower", DTYPES)
def test_float32_of_every_size(implementation, device, lower, elementwise):
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-(2**31), 2**31, (128, 515), generator=generator)
    weight = codes.to(torch.int32).view(torch.float32)
    # NaN sends its whole vector another way in some implementations; most vectors shall have none.
    weight = torch.where(weight.isfinite(), weight, 1.5).to(device)
    scale, key = scales_of_every_size(128).to(device), make_key(device)
    # Below the magnitudes of the lower dtype, among them and above: shift half of the rows there.
    weight[::2] = weight[::2].sign() * torch.exp2(torch.log2(weight[::2].abs()) / 8)
    scale[::2] = torch.exp2(torch.log2(scale[::2]) / 8)
    options = {"elementwise": elementwise, **OFFSETS}
    expected = expect(weight, scale, key, dtype=lower, **options)
    noisy = flatkern.ops.perturb(weight, scale, key, dtype=lower, **options)
    size = noise_size(weight, scale, elementwise)
    tolerances.assert_perturbed(implementation, noisy, expected, size)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, device, dtype, elementwise):
    weight = special_weights(dtype).repeat(len(SPECIAL_SCALES), 3).to(device)
    scale = torch.tensor(SPECIAL_SCALES, device=device)
    key = make_key(device)
    finite = weight[:, weight[0].isfinite()]
    check_all_forms(implementation, finite.clone(), scale, key, elementwise=elementwise)
    noisy = check_all_forms(implementation, weight.clone(), scale, key, elementwise=elementwise)

    weight, scale = weight.cpu(), scale.cpu()
    not_finite = ~weight.isfinite()
    assert torch.equal(tolerances.bits(noisy)[not_finite], tolerances.bits(weight)[not_finite])
    assert noisy[~not_finite].isfinite().all()
    counts_as_zero = ~scale.isfinite() | (scale == 0)
    same = noisy[counts_as_zero] == weight[counts_as_zero]
    assert (same | not_finite[counts_as_zero]).all()


@pytest.mark.parametrize("share", [1.0, 0.15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_would_overflow_is_left_as_it_is(implementation, device, dtype, share):
    largest = torch.finfo(dtype).max
    weight = torch.full((1, 4000), largest, dtype=dtype, device=device)
    # Two units in the last place of the largest number, so that a third of the sums overflow; and
    # a fraction of one, so that a few do, alone in their vector, and only by their rounding.
    scale = torch.full((1,), float(largest) * tolerances.STEP[dtype] * share, device=device)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key)
    assert noisy.isfinite().all()
    tolerances.assert_perturbed(implementation, noisy, expect(weight, scale, key), scale)
    upwards = flatkern.ops.noise(1, 4000, key) > 0.26 / share
    assert upwards.any()
    assert (noisy[upwards] == largest).all()
    downwards = flatkern.ops.noise(1, 4000, key) < -0.26 / share
    assert (noisy[downwards] < largest).all()


@pytest.mark.parametrize(("dtype", "lower"), LOWER[:2], ids=str)
def test_special_values_during_the_cast(implementation, device, dtype, lower):
    specials = torch.cat([special_weights(dtype), special_weights(lower).to(dtype)])
    # The tie between the largest number of the lower dtype and infinity, which overflows, and the
    # float32 before it, which does not.
    tie = 0x7F7F8000 if lower == torch.bfloat16 else 0x477FF000
    edge = from_bits([tie, tie - 1, tie + 1, tie | 1 << 31, tie - 1 | 1 << 31], torch.float32)
    weight = torch.cat([specials, edge.repeat(16)]).repeat(len(SPECIAL_SCALES), 1).to(device)
    scale = torch.tensor(SPECIAL_SCALES, device=device)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key, dtype=lower)
    expected = expect(weight, scale, key, dtype=lower)
    nan = expected.isnan()
    assert torch.equal(noisy.isnan().cpu(), nan)
    numbers = torch.where(nan, 0, noisy.cpu())
    tolerances.assert_perturbed(implementation, numbers, torch.where(nan, 0, expected), scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_scale_keeps_every_nonzero_bit(device, dtype):
    weight, scale = make((40, 65), dtype, device)
    original = weight.clone()
    flatkern.ops.perturb_(weight, torch.zeros_like(scale), make_key(device))
    nonzero = original != 0
    tolerances.assert_same_bits(weight[nonzero], original[nonzero])
    assert (weight[~nonzero] == 0).all()


def test_key_may_be_a_view(device):
    weight, scale = make((3, 20), torch.float32, device)
    keys = torch.tensor([[1, 9], [2, 9], [3, 9], [4, 9]], device=device)
    expected = flatkern.ops.perturb(weight, scale, make_key(device, (1, 2, 3, 4)))
    tolerances.assert_same_bits(flatkern.ops.perturb(weight, scale, keys[:, 0]), expected)


def test_autocast_and_default_dtype_do_not_matter(device):
    weight, scale = make((6, 50), torch.float32, device)
    lora_A, lora_B = torch.ones(2, 50, device=device), torch.ones(6, 2, device=device)

    def run():
        key, merged, written = make_key(device), weight.clone(), weight.clone()
        flatkern.ops.perturb_(written, scale, key)
        return (
            flatkern.ops.noise(6, 50, key),
            flatkern.ops.perturb(weight, scale, key),
            flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0),
            flatkern.ops.perturb_merged_(merged, lora_A, lora_B, 2.0, 0.1, key),
            merged,
            written,
        )

    expected = run()
    with torch.autocast(device.type, torch.bfloat16):
        autocast = run()
    torch.set_default_dtype(torch.float64)
    try:
        double = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for results in (autocast, double):
        for got, plain in zip(results, expected, strict=True):
            tolerances.assert_same_bits(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_scale_touches_only_its_own_row(device, dtype):
    weight, scale = make((5, 37), dtype, device)
    clean = flatkern.ops.perturb(weight, scale, make_key(device))
    scale[2] = float("nan")
    dirty = flatkern.ops.perturb(weight, scale, make_key(device))
    rows = [0, 1, 3, 4]
    tolerances.assert_same_bits(dirty[rows], clean[rows])
    assert (dirty[2] == weight[2]).all()


@pytest.mark.parametrize("elementwise", [False, True])
def test_float64(implementation, device, elementwise):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 41, generator=generator, dtype=torch.float64).to(device)
    scale = torch.rand(6, generator=generator).to(device)
    key = make_key(device)
    if not implementation.float64:
        original = weight.clone()
        for call in (flatkern.ops.perturb, flatkern.ops.perturb_, flatkern.ops.restore_):
            with pytest.raises((ValueError, RuntimeError), match="float64"):
                call(weight, scale, key, elementwise=elementwise)
        tolerances.assert_same_bits(weight, original)
        return
    noisy = flatkern.ops.perturb(weight, scale, key, elementwise=elementwise)
    assert noisy.dtype == torch.float64
    z = flatkern.ops.noise(6, 41, key)
    expected = oracle.perturbed(weight, scale, z, elementwise=elementwise)
    if elementwise:
        # Whether |W| meets the float32 product in float32 or in float64 is not specified.
        bound = 2.0**-22 * (scale[:, None] * z * weight).abs() + tolerances.ulp(noisy, noisy.dtype)
        tolerances.assert_within(noisy, expected, bound)
    else:
        tolerances.assert_same_bits(noisy, expected)
    for lower in (torch.float32, torch.bfloat16, torch.float16):
        cast = flatkern.ops.perturb(weight, scale, key, elementwise=elementwise, dtype=lower)
        assert cast.dtype == lower
        # A cast from float64 may pass through float32, so a tie may be rounded twice.
        tolerances.assert_within(cast, noisy, 0.5001 * tolerances.ulp(noisy, lower))
    in_place = weight.clone()
    flatkern.ops.perturb_(in_place, scale, key, elementwise=elementwise)
    tolerances.assert_same_bits(in_place, noisy)
    if not elementwise:
        flatkern.ops.restore_(in_place, scale, key)
        tolerances.assert_within(in_place, weight, tolerances.ulp(noisy, torch.float64))


def test_float64_runs_on_the_reference_by_itself():
    weight, scale = make((4, 9), torch.float64)
    with flatkern.backend("auto"):
        noisy = flatkern.ops.perturb(weight, scale, make_key("cpu"))
    with flatkern.backend("reference"):
        tolerances.assert_same_bits(noisy, flatkern.ops.perturb(weight, scale, make_key("cpu")))


VIEWS = {
    "columns from 3": lambda base: base[:, 3:-5],
    "columns from 0": lambda base: base[:, :-1],
    "one column": lambda base: base[:, 4:5],
    "every second row": lambda base: base[::2],
    "rows and columns": lambda base: base[1:-1:3, 1:30],
    "one row": lambda base: base[3:4, 2:],
    "a row as a column": lambda base: base.T[:, 3:4],
}


def calls_in_place(weight, scale, key):
    yield lambda: flatkern.ops.perturb_(weight, scale, key)
    yield lambda: flatkern.ops.restore_(weight, scale, key)
    yield lambda: flatkern.ops.perturb_(weight, scale, key, elementwise=True)
    yield lambda: flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_written_without_their_neighbours(device, view, dtype):
    key = make_key(device)
    for index in range(4):
        base = torch.full((11, 75), SENTINEL, dtype=dtype, device=device)
        weight = VIEWS[view](base)
        values, scale = make(tuple(weight.shape), dtype, device)
        weight.copy_(values)
        inside = torch.zeros(base.shape, dtype=torch.bool, device=device)
        VIEWS[view](inside).fill_(True)
        dense = values.clone()
        list(calls_in_place(weight, scale, key))[index]()
        list(calls_in_place(dense, scale, key))[index]()
        tolerances.assert_same_bits(weight, dense)
        assert (base[~inside] == SENTINEL).all()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("dtype", "lower"), [*LOWER[:2], LOWER[3]], ids=str)
def test_slices_are_read_and_given_as_out(device, view, dtype, lower):
    key = make_key(device)
    base = torch.full((11, 75), float("nan"), dtype=dtype, device=device)
    weight = VIEWS[view](base)
    values, scale = make(tuple(weight.shape), dtype, device)
    weight.copy_(values)
    expected = flatkern.ops.perturb(values, scale, key, dtype=lower)
    tolerances.assert_same_bits(flatkern.ops.perturb(weight, scale, key, dtype=lower), expected)
    target = torch.full((11, 75), SENTINEL, dtype=lower, device=device)
    inside = torch.zeros(target.shape, dtype=torch.bool, device=device)
    VIEWS[view](inside).fill_(True)
    flatkern.ops.perturb(weight, scale, key, out=VIEWS[view](target))
    tolerances.assert_same_bits(VIEWS[view](target), expected)
    assert (target[~inside] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_the_weight_itself(device, dtype):
    weight, scale = make((6, 60), dtype, device)
    expected = flatkern.ops.perturb(weight, scale, make_key(device))
    flatkern.ops.perturb(weight, scale, make_key(device), out=weight)
    tolerances.assert_same_bits(weight, expected)


@pytest.mark.parametrize("shift", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_that_overlaps_the_weight_is_refused(device, dtype, shift):
    # Vectors of it would be overwritten before they are read.
    base, scale = make((6, 60), dtype, device)
    original = base.clone()
    with pytest.raises(ValueError, match="out"):
        flatkern.ops.perturb(base[:, :40], scale, make_key(device), out=base[:, shift : shift + 40])
    tolerances.assert_same_bits(base, original)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_lie_beside_the_weight(device, dtype):
    # Disjoint columns of one storage: the address ranges overlap, the elements do not.
    base, scale = make((6, 60), dtype, device)
    weight, out = base[:, :30], base[:, 30:]
    expected = flatkern.ops.perturb(weight, scale, make_key(device))
    flatkern.ops.perturb(weight, scale, make_key(device), out=out)
    tolerances.assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (4, 2, 3), (5,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_of_dimensions_are_dim0_by_rest(implementation, device, shape, dtype):
    weight, scale = make(shape, dtype, device)
    flat = weight.reshape(shape[0], -1).clone()
    noisy = check_all_forms(implementation, weight, scale, make_key(device))
    assert noisy.shape == shape
    flat = flatkern.ops.perturb(flat, scale, make_key(device))
    tolerances.assert_same_bits(noisy.reshape(shape[0], -1), flat.cpu())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(device, shape, dtype):
    weight = torch.empty(shape, dtype=dtype, device=device)
    scale = torch.ones(shape[0], device=device)
    key = make_key(device)
    assert flatkern.ops.perturb(weight, scale, key).shape == shape
    assert flatkern.ops.perturb(weight, scale, key, dtype=torch.bfloat16).dtype == torch.bfloat16
    flatkern.ops.perturb_(weight, scale, key)
    flatkern.ops.restore_(weight, scale, key)
    assert flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key).shape == shape[:1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_have_the_bits_of_the_whole(device, dtype):
    weight, scale = make((23, 77), dtype, device)
    key = make_key(device)
    whole = flatkern.ops.perturb(weight, scale, key, row_offset=9, col_offset=2)
    for rows, cols in (
        ((0, 12), (0, 77)),
        ((12, 23), (0, 77)),
        ((5, 6), (1, 3)),
        ((0, 23), (30, 77)),
    ):
        window = slice(*rows), slice(*cols)
        part = weight[window].clone()
        offsets = {"row_offset": 9 + rows[0], "col_offset": 2 + cols[0]}
        flatkern.ops.perturb_(part, scale[window[0]], key, **offsets)
        tolerances.assert_same_bits(part, whole[window])


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_does_not_matter(device, threads, dtype):
    weight, scale = make((301, 1031), dtype, device)
    key = make_key(device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        in_place = weight.clone()
        flatkern.ops.perturb_(in_place, scale, key)
        restored = in_place.clone()
        flatkern.ops.restore_(restored, scale, key)
        results.append((in_place, restored, flatkern.ops.perturb(weight, scale, key)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            tolerances.assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_loses_at_most_one_step_of_the_larger(device, dtype):
    weight, scale = make((50, 301), dtype, device)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key)
    restored = noisy.clone()
    flatkern.ops.restore_(restored, scale, key)
    larger = torch.maximum(weight.abs(), noisy.abs()).double().cpu()
    # Half a step for each of the two roundings, and float32's own rounding of both sums.
    bound = tolerances.ulp(larger, dtype) + tolerances.ulp(larger, torch.float32)
    tolerances.assert_within(restored, weight, bound)
    assert (restored == weight).double().mean() > 0.3


def test_restore_of_float32_that_holds_bfloat16_is_exact_after_rounding(device):
    # The noise is of the weight's size, so the float32 errors are far below half a bfloat16 step.
    weight, _ = make((40, 257), torch.bfloat16, device)
    held = weight.float()
    scale = torch.full((40,), 0.02, device=device)
    key = make_key(device)
    flatkern.ops.perturb_(held, scale, key)
    assert (held != weight).double().mean() > 0.99
    flatkern.ops.restore_(held, scale, key)
    away_from_zero = weight.abs() > 1e-4
    assert (held.bfloat16() == weight)[away_from_zero].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_restore_is_near(device, dtype):
    weight, scale = make((20, 101), dtype, device)
    scale = scale.clamp_max(0.05)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key, elementwise=True)
    restored = noisy.clone()
    flatkern.ops.restore_(restored, scale, key, elementwise=True)
    # S = W (1 + c z sign) rounded; dividing by a factor above 0.75 loses less than two steps more.
    larger = torch.maximum(weight.abs(), noisy.abs()).double().cpu()
    tolerances.assert_within(restored, weight, 2 * tolerances.ulp(larger, dtype))
    assert (restored != weight).double().mean() < 0.5 * (noisy != weight).double().mean()


def test_flush_denormal_does_not_change_results(implementation, device, threads):
    if not implementation.ignores_flush_denormal:
        pytest.skip(f"{implementation.name} computes with the flag that PyTorch is given")
    key = make_key(device)
    scale = torch.tensor([1e-45, 1e-41, 3e-39, 1e-38, 0.0, 1e-7], device=device)

    steps = torch.arange(-200, 200, device=device, dtype=torch.float64) / 128
    originals = [
        (steps * torch.finfo(dtype).tiny).to(dtype).repeat(len(scale), 1) for dtype in DTYPES
    ]

    def run():
        results = [flatkern.ops.noise(64, 64, key)]
        for original in originals:
            weight = original.clone()
            results.append(flatkern.ops.perturb(weight, scale, key))
            flatkern.ops.perturb_(weight, scale, key)
            results += [weight, flatkern.ops.row_norm(weight)]
        return [tolerances.bits(result) for result in results]

    threads(1)
    expected = run()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = run()
    finally:
        torch.set_flush_denormal(False)
    for index, (after, before) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(after, before), index


def in_place_calls(device):
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    return {
        "perturb_": lambda w: flatkern.ops.perturb_(w, scale, key),
        "restore_": lambda w: flatkern.ops.restore_(w, scale, key),
        "perturb_merged_": lambda w: flatkern.ops.perturb_merged_(w, None, None, 1.0, 0.1, key),
        "perturb.out": lambda w: flatkern.ops.perturb(torch.ones_like(w), scale, key, out=w),
    }


IN_PLACE = ["perturb_", "restore_", "perturb_merged_", "perturb.out"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_version_counter(device, name, compiled):
    call = in_place_calls(device)[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    base = torch.ones(4, 16, device=device)
    weight = base[:, :8] if not compiled else base
    before = weight._version
    call(weight)
    assert weight._version > before
    assert base._version == weight._version


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_backward_after_a_write_raises(device, name, compiled):
    call = in_place_calls(device)[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    weight = torch.ones(4, 16, device=device)
    x = torch.ones(2, 16, device=device, requires_grad=True)
    loss = F.linear(x, weight).sum()
    call(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(device):
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    normal = torch.ones(4, 16, device=device)
    expected = flatkern.ops.perturb(normal, scale, key)
    before = normal._version
    with torch.inference_mode():
        inference = torch.ones(4, 16, device=device)
        for weight in (normal, inference):
            tolerances.assert_same_bits(flatkern.ops.perturb(weight, scale, key), expected)
            flatkern.ops.perturb_(weight, scale, key)
            tolerances.assert_same_bits(weight, expected)
    assert normal._version > before


def test_parameter_under_no_grad(device):
    weight = torch.nn.Parameter(torch.ones(4, 16, device=device))
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    expected = flatkern.ops.perturb(weight, scale, key).detach()
    with torch.no_grad():
        flatkern.ops.perturb_(weight, scale, key)
    tolerances.assert_same_bits(weight, expected)
    assert weight.is_leaf
    assert weight.requires_grad


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize(("dtype", "lower"), LOWER, ids=str)
def test_gradient_of_the_weight_is_the_identity(device, dtype, lower, elementwise):
    weight, scale = make((5, 30), dtype, device)
    weight.requires_grad_()
    noisy = flatkern.ops.perturb(
        weight, scale, make_key(device), dtype=lower, elementwise=elementwise
    )
    gradient = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).to(device, lower)
    noisy.backward(gradient)
    tolerances.assert_same_bits(weight.grad, gradient.to(dtype))


def test_scale_is_a_constant_to_autograd(device):
    weight, scale = make((5, 30), torch.float32, device)
    scale.requires_grad_()
    assert not flatkern.ops.perturb(weight, scale, make_key(device)).requires_grad
    weight.requires_grad_()
    flatkern.ops.perturb(weight, scale, make_key(device)).sum().backward()
    assert scale.grad is None
    with torch.no_grad():
        expected = flatkern.ops.perturb(weight, scale, make_key(device))
    plain = weight.detach().clone()
    flatkern.ops.perturb_(plain, scale, make_key(device))
    tolerances.assert_same_bits(plain, expected)
    assert not plain.requires_grad


def test_no_temporary_of_the_weights_size(implementation, device):
    if not implementation.streams:
        pytest.skip(f"{implementation.name} materialises what it needs")
    from flatkern._memory import peak_bytes

    weight = torch.full((2048, 4096), 0.5, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(weight)
    scale, key = torch.full((2048,), 0.1, device=device), make_key(device)
    slice_of_it = weight[:, 1:]
    calls = {
        "perturb_": lambda: flatkern.ops.perturb_(weight, scale, key),
        "restore_": lambda: flatkern.ops.restore_(weight, scale, key),
        "strided": lambda: flatkern.ops.perturb_(slice_of_it, scale, key),
        "out": lambda: flatkern.ops.perturb(weight, scale, key, out=out),
        "merged": lambda: flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key),
    }
    for name, call in calls.items():
        # The weight is 16 MiB; what an op may need is a few rows, or c.
        assert peak_bytes(call, device) < 1 << 20, name
