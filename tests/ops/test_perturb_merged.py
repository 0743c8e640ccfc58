"""perturb_merged_ against row_norm, then perturb_: one pass must not change what they mean."""

import math

import few
import oracle
import pytest
import tolerances
import torch

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 5), (3, 8), (7, 9), (33, 129), (6, 1003), (2, 4130)]
SHAPES = few.cases(4, SHAPES)
KEY = (8, 5, 1, 2)


def make(shape, dtype, rank, adapter_dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape[1:])
    weight = (torch.randn(shape, generator=generator) * 0.02).to(device, dtype)
    if rank is None:
        return weight, None, None
    lora_A = torch.randn(rank, n, generator=generator) * 0.1
    lora_B = torch.randn(shape[0], rank, generator=generator) * 0.1
    return weight, lora_A.to(device, adapter_dtype), lora_B.to(device, adapter_dtype)


def make_key(device):
    return flatkern.NoiseKey(*KEY).to(device)


def check(weight, lora_A, lora_B, scaling, sigma, key, **options):
    n = oracle.as_rows(weight).shape[1]
    norm = flatkern.ops.row_norm(weight, lora_A, lora_B, scaling)
    merged = weight.clone()
    scale = flatkern.ops.perturb_merged_(merged, lora_A, lora_B, scaling, sigma, key, **options)
    assert scale.dtype == torch.float32
    assert scale.shape == weight.shape[:1]
    # sigma/sqrt(n) rounded to float32, times the norm, rounded: at most two half ulps.
    exact = norm.double() * (sigma / math.sqrt(n))
    bound = 1.5 * tolerances.ulp(exact, torch.float32).cpu()
    tolerances.assert_within(scale, exact, bound)
    flatkern.ops.perturb_(weight, scale, key, **options)
    tolerances.assert_same_bits(merged, weight)
    return scale


# The adapters are the norm's business, the form is the noise's.
@pytest.mark.parametrize(
    ("rank", "elementwise"), [(None, False), (None, True), (1, False), (8, True), (17, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_row_norm_then_perturb(device, dtype, rank, elementwise):
    key = make_key(device)
    for shape in SHAPES:
        arguments = make(shape, dtype, rank, torch.float32, device)
        check(*arguments, 2.0, 0.1, key, elementwise=elementwise, row_offset=2**31 + 3)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_another_dtype(device, dtype, adapter_dtype):
    for shape in ((7, 9), (33, 129)):
        arguments = make(shape, dtype, 8, adapter_dtype, device)
        check(*arguments, 2.0, 0.1, make_key(device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_equals_the_float64_formula(device, dtype):
    weight, lora_A, lora_B = make((40, 300), dtype, 8, device=device)
    exact = oracle.row_norm(weight.cpu(), lora_A.cpu(), lora_B.cpu(), 2.0) * (0.05 / 300**0.5)
    scale = flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.05, make_key(device))
    torch.testing.assert_close(scale.cpu().double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_has_the_norm_of_sigma_times_the_row(device, dtype):
    weight, lora_A, lora_B = make((20, 5000), dtype, 8, device=device)
    norm = oracle.row_norm(weight.cpu(), lora_A.cpu(), lora_B.cpu(), 2.0)
    before = weight.double().cpu()
    flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.2, make_key(device))
    ratio = (weight.double().cpu() - before).norm(dim=1) / (0.2 * norm)
    assert ((ratio - 1).abs() < tolerances.Z_SCORE / (2 * 5000) ** 0.5).all(), ratio


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_zero_keeps_every_nonzero_bit(device, dtype):
    weight, lora_A, lora_B = make((9, 40), dtype, 3, device=device)
    original = weight.clone()
    scale = flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.0, make_key(device))
    assert (scale == 0).all()
    assert torch.equal(weight, original)
    tolerances.assert_same_bits(weight[original != 0], original[original != 0])


def assert_same(implementation, weight, scale, expected, expected_scale):
    """Weights and scales have the same bits, where nobody else multiplies."""
    tolerances.assert_same_norms(implementation, scale, expected_scale)
    if implementation.own_products:
        tolerances.assert_same_bits(weight, expected)
        return
    change = tolerances.NORM_OTHER_ORDER * tolerances.NOISE_RADIUS * expected_scale[:, None]
    bound = change.double() + tolerances.ulp(expected, expected.dtype)
    tolerances.assert_within(weight, expected, bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_is_left_as_it_is(implementation, device, dtype, bad):
    weight, lora_A, lora_B = make((6, 50), dtype, 3, device=device)
    clean = weight.clone()
    clean_scale = flatkern.ops.perturb_merged_(clean, lora_A, lora_B, 2.0, 0.1, make_key(device))
    weight[2, 17] = bad
    original = weight.clone()
    scale = flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.1, make_key(device))
    rows = [0, 1, 3, 4, 5]
    assert_same(implementation, weight[rows], scale[rows], clean[rows], clean_scale[rows])
    finite = original[2].isfinite()
    assert torch.equal(weight[2][finite], original[2][finite])
    tolerances.assert_same_bits(weight[2][~finite], original[2][~finite])


def test_rows_of_a_shard_have_the_bits_of_the_whole(implementation, device):
    weight, lora_A, lora_B = make((40, 77), torch.bfloat16, 4, device=device)
    whole, key = weight.clone(), make_key(device)
    scale = flatkern.ops.perturb_merged_(whole, lora_A, lora_B, 2.0, 0.1, key, row_offset=100)
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        part = weight[start:stop].clone()
        part_scale = flatkern.ops.perturb_merged_(
            part, lora_A, lora_B[start:stop], 2.0, 0.1, key, row_offset=100 + start
        )
        rows = slice(start, stop)
        assert_same(implementation, part, part_scale, whole[rows], scale[rows])


def test_number_of_threads_does_not_matter(device, threads):
    weight, lora_A, lora_B = make((301, 1031), torch.bfloat16, 8, device=device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        merged = weight.clone()
        scale = flatkern.ops.perturb_merged_(merged, lora_A, lora_B, 2.0, 0.1, make_key(device))
        results.append((merged, scale))
    for merged, scale in results[1:]:
        tolerances.assert_same_bits(merged, results[0][0])
        tolerances.assert_same_bits(scale, results[0][1])


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (5,)], ids=str)
def test_other_numbers_of_dimensions_are_dim0_by_rest(device, shape):
    check(*make(shape, torch.float32, 2, device=device), 2.0, 0.1, make_key(device))


def test_restore_takes_the_returned_scale(device):
    weight, lora_A, lora_B = make((30, 200), torch.float32, 4, device=device)
    original, key = weight.clone(), make_key(device)
    scale = flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.1, key)
    assert (weight != original).double().mean() > 0.99
    flatkern.ops.restore_(weight, scale, key)
    bound = 2 * tolerances.ulp(original.abs().max() + 5 * scale.max(), torch.float32)
    tolerances.assert_within(weight, original, bound)


def test_scale_is_a_new_tensor_and_a_constant(device):
    weight, lora_A, lora_B = make((6, 20), torch.float32, 3, device=device)
    lora_A.requires_grad_()
    lora_B.requires_grad_()
    scale = flatkern.ops.perturb_merged_(weight, lora_A, lora_B, 2.0, 0.1, make_key(device))
    assert not scale.requires_grad
    assert not weight.requires_grad


def test_float64(implementation, device):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 41, generator=generator, dtype=torch.float64).to(device)
    original = weight.clone()
    if not implementation.float64:
        with pytest.raises((ValueError, RuntimeError), match="float64"):
            flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, make_key(device))
        tolerances.assert_same_bits(weight, original)
        return
    check(weight, None, None, 1.0, 0.1, make_key(device))
