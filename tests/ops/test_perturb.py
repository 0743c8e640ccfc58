"""perturb, perturb_ and restore_: one rounding at a time, in place or not, nothing else written.

What is expected is float32(W) + float32(c_i * z_ij), rounded once, with z the implementation's own
noise, which test_noise.py holds against the specification.
"""

import random

import few
import oracle
import pytest
import tolerances
import torch
from perturb_cases import (
    DTYPES,
    LOWER,
    OFFSETS,
    SHAPES,
    check_all_forms,
    expect,
    make,
    make_key,
    noise_size,
)

import flatkern


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
    for trial in range(few.trials(60)):
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


def test_restore_of_the_largest_number_gives_it_back_or_leaves_the_sum(device):
    """Half a unit in the last place, by which a sum was rounded up, is enough to overflow."""
    largest = torch.finfo(torch.float32).max
    weight = torch.full((1, 4000), largest, device=device)
    scale, key = torch.full((1,), largest / 4, device=device), make_key(device)
    flatkern.ops.perturb_(weight, scale, key)
    noisy = weight.clone()
    flatkern.ops.restore_(weight, scale, key)
    moved, left = noisy != largest, weight == noisy
    assert 0 < (moved & left).double().mean() < 0.5
    tolerances.assert_within(
        weight[moved & ~left],
        torch.tensor(largest, dtype=torch.float64),
        tolerances.ulp(largest, torch.float32),
    )


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
