"""row_norm against dense float64 norms of W + s B A."""

import itertools

import few
import oracle
import pytest
import tolerances
import torch

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (5, 3), (3, 8), (7, 9), (4, 33), (65, 127), (9, 1000), (3, 4097)]
SHAPES = few.cases(3, SHAPES)


def make(m, n, dtype, rank=None, adapter_dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator).to(device, dtype)
    if rank is None:
        return weight, None, None
    lora_A = torch.randn(rank, n, generator=generator) / max(rank, 1) ** 0.5
    lora_B = torch.randn(m, rank, generator=generator)
    return weight, lora_A.to(device, adapter_dtype), lora_B.to(device, adapter_dtype)


def check(weight, lora_A=None, lora_B=None, scaling=1.0):
    got = flatkern.ops.row_norm(weight, lora_A, lora_B, scaling)
    assert got.shape == weight.shape[:1]
    assert got.device == weight.device
    arguments = [x if x is None else x.cpu() for x in (weight, lora_A, lora_B)]
    rank = 0 if lora_A is None else lora_A.shape[0]
    bound = tolerances.row_norm_bound(oracle.row_norm_scale(*arguments, scaling), rank)
    tolerances.assert_within(got, oracle.row_norm(*arguments, scaling), bound)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_adapters(device, shape, dtype):
    weight, _, _ = make(*shape, dtype, device=device)
    assert check(weight).dtype == torch.float32
    tolerances.assert_same_bits(
        flatkern.ops.row_norm(weight), flatkern.ops.row_norm(weight, None, None, 3.0)
    )


# Every two of a dtype, an adapter's dtype and a rank meet once.
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "rank"),
    [(DTYPES[i], DTYPES[j], (1, 8, 17)[(i + j) % 3]) for i in range(3) for j in range(3)],
)
def test_with_adapters(device, rank, dtype, adapter_dtype):
    for shape, scaling in zip(SHAPES, itertools.cycle((2.0, -0.3))):
        weight, lora_A, lora_B = make(*shape, dtype, rank, adapter_dtype, device)
        assert check(weight, lora_A, lora_B, scaling).dtype == torch.float32


def test_adapters_may_differ_from_each_other(device):
    weight, lora_A, lora_B = make(6, 50, torch.bfloat16, 4, torch.float32, device)
    check(weight, lora_A.to(torch.float16), lora_B, 1.5)


def test_oracle_equals_the_algebraic_identity():
    weight, lora_A, lora_B = make(40, 300, torch.float32, 8)
    for scaling in (2.0, -0.7, 0.0):
        dense = oracle.row_norm(weight, lora_A, lora_B, scaling)
        algebra = oracle.row_norm_by_algebra(weight, lora_A, lora_B, scaling)
        torch.testing.assert_close(dense, algebra, rtol=1e-13, atol=0)


def test_equals_the_algebraic_identity(device):
    weight, lora_A, lora_B = make(64, 777, torch.float32, 16, device=device)
    got = flatkern.ops.row_norm(weight, lora_A, lora_B, 0.5)
    expected = oracle.row_norm_by_algebra(weight.cpu(), lora_A.cpu(), lora_B.cpu(), 0.5)
    # Nothing cancels here, so a few float32 half ulps of the norm itself.
    torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-6, atol=0)


def test_scaling_zero_and_zero_adapters_are_the_weights_own_norm(device):
    weight, lora_A, lora_B = make(12, 130, torch.bfloat16, 8, device=device)
    own = check(weight)
    bound = tolerances.ulp(own.cpu(), torch.float32)
    for arguments in ((lora_A, lora_B, 0.0), (lora_A, torch.zeros_like(lora_B), 2.0)):
        tolerances.assert_within(check(weight, *arguments), own, bound)


def test_rank_zero(device):
    weight, lora_A, lora_B = make(4, 20, torch.float32, 0, device=device)
    check(weight, lora_A, lora_B, 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_sizes_that_a_square_in_the_dtype_would_not_hold(device, dtype, size):
    weight, lora_A, lora_B = make(8, 257, dtype, 4, device=device)
    check((weight.float() * size / 5).to(dtype), lora_A * size, lora_B)
    check((weight.float() * size / 5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_sizes_whose_square_is_still_a_float32(device, dtype, size):
    weight, lora_A, lora_B = make(8, 257, dtype, 4, device=device)
    check((weight.float() * size).to(dtype), lora_A * size, lora_B)
    check((weight.float() * size).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e30])
@pytest.mark.parametrize("n", [5, 257])
def test_sizes_whose_square_is_not_a_float32(device, dtype, size, n):
    # The norm is a float32 all the same: an infinite one would silently turn the noise off.
    weight, lora_A, lora_B = make(8, n, dtype, 4, device=device)
    weight = (weight.float() * size).to(dtype)
    weight[3] = 1.0
    check(weight)
    check(weight, lora_A * size, lora_B)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(device, dtype):
    weight, lora_A, lora_B = make(6, 100, dtype, 3, device=device)
    weight[:, ::3] = 0
    weight[2] = 0
    check(weight)
    check(weight, lora_A, lora_B)
    lora_B[2] = 0
    assert check(weight, lora_A, lora_B)[2] == 0
    assert check(weight)[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_equal_values(device, dtype):
    # Rounding errors of equal summands all point one way: one float32 sum would lose 1e-3 here.
    weight = torch.full((2, 2**18 + 3), 0.1, dtype=dtype, device=device)
    weight[1] = -0.7
    expected = oracle.row_norm(weight.cpu())
    torch.testing.assert_close(
        flatkern.ops.row_norm(weight).cpu().double(), expected, rtol=2e-6, atol=0
    )


def test_cancellation(device):
    # s B A = -0.99 W: the norm is a hundredth of its parts, the error stays relative to the parts.
    generator = torch.Generator().manual_seed(1)
    lora_A = torch.randn(4, 512, generator=generator).to(device)
    lora_B = torch.randn(16, 4, generator=generator).to(device)
    check(-lora_B @ lora_A / 0.99, lora_A, lora_B, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 8])
def test_rows_of_a_shard_have_the_bits_of_the_whole(implementation, device, dtype, rank):
    weight, lora_A, lora_B = make(67, 515, dtype, rank, device=device)
    whole = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    for start, stop in ((0, 1), (0, 16), (1, 2), (5, 38), (16, 67), (66, 67)):
        part_B = None if rank is None else lora_B[start:stop]
        part = flatkern.ops.row_norm(weight[start:stop], lora_A, part_B, 2.0)
        tolerances.assert_same_norms(implementation, part, whole[start:stop])


@pytest.mark.parametrize("rank", [None, 8])
def test_number_of_threads_does_not_matter(device, threads, rank):
    weight, lora_A, lora_B = make(301, 1025, torch.bfloat16, rank, device=device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0))
    tolerances.assert_same_bits(results[1], results[0])
    tolerances.assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_row_that_is_not_finite_stays_alone(implementation, device, dtype, rank, bad):
    weight, lora_A, lora_B = make(9, 65, dtype, rank, device=device)
    clean = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    weight[4, 64] = bad
    dirty = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    assert not dirty[4].isfinite()
    others = torch.arange(9, device=device) != 4
    tolerances.assert_same_norms(implementation, dirty[others], clean[others])
    if rank is not None:
        lora_B[7, 0] = bad
        dirty = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
        assert not dirty[7].isfinite()
        others[7] = False
        tolerances.assert_same_norms(implementation, dirty[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_columns_and_rows(implementation, device, dtype):
    big, lora_A, lora_B = make(21, 220, dtype, 5, device=device)
    for rows, cols in (((0, 21, 1), (3, 104)), ((1, 21, 2), (0, 220)), ((4, 9, 1), (219, 220))):
        weight = big[slice(*rows), slice(*cols)]
        part_A, part_B = lora_A[:, slice(*cols)], lora_B[slice(*rows)]
        got = check(weight, part_A.contiguous(), part_B.contiguous(), 2.0)
        dense = weight.contiguous()
        expected = flatkern.ops.row_norm(dense, part_A.contiguous(), part_B.contiguous(), 2.0)
        tolerances.assert_same_norms(implementation, got, expected)


@pytest.mark.parametrize("n", [40, 48])
def test_adapters_of_any_layout(device, n):
    weight, lora_A, lora_B = make(11, n, torch.float32, 6, device=device)
    expected = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    transposed_A, transposed_B = lora_A.T.contiguous().T, lora_B.T.contiguous().T
    for adapters in (
        (transposed_A, lora_B),
        (lora_A, transposed_B),
        (torch.cat([lora_A, lora_A], 1)[:, :n], torch.cat([lora_B, lora_B], 1)[:, :6]),
    ):
        got = flatkern.ops.row_norm(weight, *adapters, 2.0)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (4, 2, 3), (5,)])
def test_other_numbers_of_dimensions_are_dim0_by_rest(implementation, device, shape):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator).to(device)
    rest = weight[0].numel()
    _, lora_A, lora_B = make(shape[0], rest, torch.float32, 2, device=device)
    got = check(weight, lora_A, lora_B, 0.5)
    flat = flatkern.ops.row_norm(weight.reshape(shape[0], rest), lora_A, lora_B, 0.5)
    tolerances.assert_same_norms(implementation, got, flat)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rank", [None, 2])
def test_empty(device, shape, rank):
    weight, lora_A, lora_B = make(*shape, torch.bfloat16, rank, device=device)
    got = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    assert got.tolist() == [0.0] * shape[0]


def test_float64(implementation, device):
    weight, lora_A, lora_B = make(7, 90, torch.float64, 3, torch.float64, device)
    if not implementation.float64:
        with pytest.raises((ValueError, RuntimeError), match="float64"):
            flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
        return
    got = flatkern.ops.row_norm(weight, lora_A, lora_B, 2.0)
    # Stored as float32 or wider: one float32 half ulp and the error of float64 sums.
    expected = oracle.row_norm(weight, lora_A, lora_B, 2.0)
    tolerances.assert_within(got, expected, tolerances.ulp(expected, torch.float32))


def test_inputs_are_only_read_and_norms_are_constants(device):
    arguments = [x.requires_grad_() for x in make(5, 30, torch.float32, 4, device=device)]
    before = [tolerances.bits(x) for x in arguments]
    versions = [x._version for x in arguments]
    got = flatkern.ops.row_norm(*arguments, 2.0)
    assert not got.requires_grad
    assert [x._version for x in arguments] == versions
    for tensor, old in zip(arguments, before, strict=True):
        assert torch.equal(tolerances.bits(tensor), old)
