"""Products that make their noise, interpreted, against `perturb` and a product in float64."""

import pytest
import torch

import flatkern
from flatkern import _machine

if not _machine.TRITON_INTERPRETED:
    pytest.skip("test_interpreted.py runs this with TRITON_INTERPRET=1", allow_module_level=True)

from flatkern import triton as kernels
from flatkern.ops._noisy_linear import NoisyWeight
from flatkern.triton import _launch

KEY = (3, 14, 15, 92)
HALVES = [torch.bfloat16, torch.float16]
# (tokens, rows, cols, row_offset, col_offset): whole tiles, tiles that every side cuts, several
# parts, rows that no vector fits, groups that the first column cuts.
SIZES = [
    (64, 64, 128, 0, 0),
    (70, 72, 136, 2**32 - 72, 2**33 + 8),
    (3, 33, 100, 5, 3),
    (1, 130, 65, 0, 2),
    (5, 65, 64, 0, 4),
]


def make_key():
    return flatkern.NoiseKey(*KEY).to("cpu")


def make(size, dtype, weight_dtype):
    tokens, rows, cols, row_offset, col_offset = size
    generator = torch.Generator().manual_seed(rows * cols)
    weight = (torch.randn(rows, cols, generator=generator) * 0.05).to(weight_dtype)
    scale = torch.rand(rows, generator=generator) * 0.05
    # Too small and too large for the usual way to c z, but not for the result; none.
    scale[1], scale[2], scale[3] = 1e-39, 1e3, float("nan")
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    grad = torch.randn(tokens, rows, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return weight, scale, x, grad, bias, {"row_offset": row_offset, "col_offset": col_offset}


def assert_is_product(got, left, right, added=None):
    """One rounding of left @ right (+ added), whose sums were in float32."""
    left, right = left.double(), right.double()
    exact, size = left @ right, left.abs() @ right.abs()
    if added is not None:
        exact, size = exact + added.double(), size + added.double().abs()
    # Half an ulp, and what n additions in float32 lose.
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs()
    slack = (left.shape[1] + 2) * 2.0**-24 * size + torch.finfo(got.dtype).smallest_normal
    assert ((got.double() - exact).abs() <= 1.01 * rounding + slack).all()


# Elementwise in a geometry with vectors, and in one without.
@pytest.mark.parametrize(
    ("size", "elementwise"),
    [*((size, False) for size in SIZES), (SIZES[1], True), (SIZES[3], True)],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_products(dtype, size, elementwise):
    for weight_dtype in (dtype, torch.float32):
        weight, scale, x, grad, bias, offsets = make(size, dtype, weight_dtype)
        key = make_key()
        options = {"elementwise": elementwise, **offsets}
        noisy = kernels.perturb(weight, scale, key, dtype=dtype, **options)
        y = kernels.noisy_linear(x, weight, scale, key, bias=bias, **options)
        assert_is_product(y, x, noisy.t(), bias)
        assert y.dtype == dtype
        grad_x = kernels.noisy_linear_grad_x(grad, weight, scale, key, **options)
        assert_is_product(grad_x, grad, noisy)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("col_offset", [0, 3])
def test_tiles_have_the_bits_of_perturb(dtype, col_offset):
    """A product with the unit matrix shows them, but for the sign of zero."""
    weight, scale, *_ = make((1, 70, 72, 0, 0), dtype, dtype)
    weight[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).max, 1e-7])
    scale[2] = 3e38
    key, offsets = make_key(), {"row_offset": 1, "col_offset": col_offset}
    noisy = kernels.perturb(weight, scale, key, **offsets)
    y = kernels.noisy_linear(torch.eye(72, dtype=dtype), weight, scale, key, **offsets)
    assert torch.equal(y.t(), noisy)
    grad_x = kernels.noisy_linear_grad_x(torch.eye(70, dtype=dtype), weight, scale, key, **offsets)
    assert torch.equal(grad_x, noisy)


def test_what_is_not_finite_stays_in_its_row():
    weight, scale, x, *_ = make((4, 66, 40, 0, 0), torch.bfloat16, torch.bfloat16)
    weight[5, 7] = float("inf")
    y = kernels.noisy_linear(x, weight, scale, make_key())
    assert not y[:, 5].isfinite().any()
    assert y[:, torch.arange(66) != 5].isfinite().all()


def test_strided_weights_and_activations():
    weight, scale, x, grad, bias, _ = make((6, 66, 40, 0, 0), torch.bfloat16, torch.bfloat16)
    wide = torch.full((66, 56), torch.nan, dtype=weight.dtype)
    wide[:, 8:48] = weight
    key = make_key()
    y = kernels.noisy_linear(x, weight, scale, key, bias=bias)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :40]):
        again = kernels.noisy_linear(other, wide[:, 8:48], scale, key, bias=bias)
        assert torch.equal(again, y)
    grad_x = kernels.noisy_linear_grad_x(grad, weight, scale, key)
    again = kernels.noisy_linear_grad_x(
        torch.cat([grad, grad], 1)[:, :66], wide[:, 8:48], scale, key
    )
    assert torch.equal(again, grad_x)


@pytest.mark.parametrize("sizes", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(sizes):
    tokens, rows, cols = sizes
    weight, bias = torch.ones(rows, cols, dtype=torch.bfloat16), torch.ones(rows).bfloat16()
    x, grad = torch.ones(tokens, cols).bfloat16(), torch.ones(tokens, rows).bfloat16()
    scale = torch.ones(rows)
    y = kernels.noisy_linear(x, weight, scale, make_key(), bias=bias)
    assert torch.equal(y, bias.expand(tokens, rows))
    grad_x = kernels.noisy_linear_grad_x(grad, weight, scale, make_key())
    assert torch.equal(grad_x, torch.zeros(tokens, cols).bfloat16())


def test_parts_are_added_with_the_bias():
    weight, scale, x, _, bias, _ = make((2, 64, 320, 0, 0), torch.float16, torch.float16)
    key = make_key()
    assert _launch.product_tile(2, 64, 320).splits > 1
    y = kernels.noisy_linear(x, weight, scale, key, bias=bias)
    assert_is_product(y, x, kernels.perturb(weight, scale, key).t(), bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_op_takes_them(monkeypatch, dtype):
    """Forward and backward of ops.noisy_linear, where the choice falls on the fused products."""
    asked = []

    def is_fused(self, tokens, transposed):
        asked.append((tokens, transposed))
        return True

    monkeypatch.setattr(NoisyWeight, "_is_fused", is_fused)
    weight, scale, x, grad, bias, offsets = make((6, 40, 48, 7, 8), dtype, dtype)
    x.requires_grad_()
    with flatkern.backend("triton"):
        y = flatkern.ops.noisy_linear(
            x.view(2, 3, 48), weight, bias, None, None, 1.0, scale, make_key(), **offsets
        )
        y.backward(grad.view(2, 3, 40))
        noisy = flatkern.ops.perturb(weight, scale, make_key(), **offsets)
    assert asked == [(6, False), (6, True)]
    assert_is_product(y.detach().view(6, 40), x.detach(), noisy.t(), bias)
    assert_is_product(x.grad, grad, noisy)
