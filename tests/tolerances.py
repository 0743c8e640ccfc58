"""How much error a test allows, and why. Every number here has its reason beside it."""

import torch

# docs/noise.md: what any two implementations of the noise may differ by. Hardware log, sin
# and cos on GPUs are good to about 1e-6 of a radius below 6.8; only where u is within a few float32
# steps of 1 does the error of log weigh more, which 5e-4 covers.
NOISE_BULK = 1e-5
NOISE_BULK_SHARE = 0.9999
NOISE_MAX = 5e-4

# float32 log, sqrt, sin and cos of libm are within one or two ulps: 2 ulps of a radius below 6.77
# (9.5e-7), and the rounding of pi*v (2**-23 at most, times the radius: 8.1e-7).
NOISE_REFERENCE = 2e-6

# Largest radius of the noise: u is at least 2**-33, so sqrt(66 ln 2) = 6.764.
NOISE_RADIUS = 6.7642

# Statistical tests: a statistic that is standard normal under the hypothesis exceeds 5 with
# probability 5.7e-7. A p-value is held above 1e-6. With about 60 statistics for one implementation
# a correct generator fails somewhere in one of 2e4 choices of seed; the seeds are fixed.
Z_SCORE = 5.0
P_VALUE = 1e-6

# Row norms whose products numpy's BLAS computes, as it does under Triton's interpreter: it adds in
# an order that depends on the processor and on a row's place among others. A few float32 half ulps
# of norms in which nothing cancels, as row_norm_bound has them.
NORM_OTHER_ORDER = 2e-6

STEP = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


def ulp(value, dtype):
    """Distance from |value| (tensor or number) to the next number of `dtype`, in float64."""
    size = torch.as_tensor(value, dtype=torch.float64).abs()
    smallest_normal = torch.finfo(dtype).tiny
    exponent = torch.floor(torch.log2(size.clamp_min(smallest_normal)))
    return torch.exp2(exponent) * STEP[dtype]


def row_norm_bound(scale, rank):
    """Bound on the error of a float32 row norm of W + sBA; `scale` = norms of |W| + |s||B||A|.

    A dot product of length r in float32 errs by at most r+1 half ulps of the sum of absolute
    products, adding W by one more; squares accumulated in blocks, the root and the last rounding
    are given 8 more (2e-7 relative was measured at n = 4096; 8 half ulps are 4.8e-7).
    """
    return (rank + 10) * 2.0**-24 * scale


def eager_bound(eager, exact, dtype):
    """Twice the error of eager PyTorch in the same dtype, plus an ulp of the largest value."""
    if exact.numel() == 0:
        return 0.0
    error = (eager.double() - exact).abs().max()
    return (2 * error + ulp(exact.abs().max(), dtype)).item()


def bits(tensor):
    """The tensor's bit patterns: NaN payloads and the sign of zero count."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(integer[tensor.element_size()])


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    different = bits(got) != bits(expected)
    if different.any():
        where = different.nonzero()
        first = tuple(where[0].tolist())
        raise AssertionError(
            f"{len(where)} of {different.numel()} elements differ, first at {first}: "
            f"got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


def assert_within(got, exact, bound):
    """|got - exact| <= bound everywhere (bound a number or a tensor); NaN never passes."""
    error = (got.detach().cpu().double() - exact.detach().cpu().double()).abs()
    bound = torch.as_tensor(bound, dtype=torch.float64, device="cpu")
    ok = error <= bound
    if not ok.all():
        worst = torch.where(ok, 0.0, (error - bound).nan_to_num(nan=torch.inf)).argmax()
        raise AssertionError(
            f"{(~ok).sum().item()} of {ok.numel()} beyond the bound; worst error "
            f"{error.flatten()[worst].item():.3g} with bound "
            f"{bound.expand_as(error).flatten()[worst].item():.3g}"
        )


def assert_same_norms(implementation, got, expected):
    """The same bits; NORM_OTHER_ORDER where somebody else's product adds up."""
    if implementation.own_products:
        assert_same_bits(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=NORM_OTHER_ORDER, atol=0, equal_nan=True)


def assert_perturbed(implementation, got, expected, size, before=None):
    """`expected` is built from the implementation's own noise, one rounding at a time.

    An implementation that multiplies c into the radius rounds e once less: its e may differ by the
    noise tolerance times its `size`, c [rows] or c |W|, and the result by one more ulp where that
    crosses a rounding boundary. Where such a last bit decides whether the sum overflows, which
    leaves an element as it was, the sum and what was `before` are both right.
    """
    if not implementation.folds_scale:
        assert_same_bits(got.cpu(), expected)
        return
    got = got.cpu()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    finite = expected.isfinite()
    assert_same_bits(got[~finite], expected[~finite])
    size = torch.where(size.isfinite(), size, 0).abs().double().cpu()
    if size.dim() < expected.dim():
        size = size.view(-1, *[1] * (expected.dim() - 1))
    size = size.expand_as(expected)
    bound = NOISE_BULK * size + ulp(expected.double().nan_to_num(), expected.dtype)
    if before is not None:
        before, edge = before.cpu(), torch.finfo(expected.dtype).max - bound
        summed = torch.maximum(got.double().abs(), expected.double().abs()) >= edge
        left = (got == before) ^ (expected == before)
        finite &= ~(summed & left)
    assert_within(got[finite], expected[finite], bound[finite])
