"""noisy_linear against float64 autograd through the materialised noisy weight."""

import itertools
import random

import few
import pytest
import tolerances
import torch
from noisy_linear_cases import ARGUMENTS, DTYPES, OFFSETS, check, leaves, make, make_key, run_all

import flatkern


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 5), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(device, dtype, lead, elementwise):
    tensors, scale = make(19, 33, lead, dtype=dtype)
    if elementwise:
        scale *= 3
    check(tensors, scale, 2.0, device, elementwise=elementwise, **OFFSETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_adapters_of_another_dtype(device, dtype, adapter_dtype):
    tensors, scale = make(24, 40, (6,), dtype=dtype, rank=8, adapter_dtype=adapter_dtype)
    check(tensors, scale, 0.5, device)


@pytest.mark.parametrize(("bias", "rank"), [*itertools.product([False, True], [None, 1, 8])])
def test_without_bias_or_adapters(device, bias, rank):
    for dtype in DTYPES:
        tensors, scale = make(10, 21, (5,), dtype=dtype, rank=rank, bias=bias)
        check(tensors, scale, 2.0, device)


def test_random_problems(device):
    draw = random.Random(31)
    for trial in range(few.trials(60)):
        dtype = draw.choice(DTYPES)
        tensors, scale = make(
            draw.choice([1, 2, 3, 8, 31, 64]),
            draw.choice([1, 2, 5, 16, 47, 130]),
            tuple(draw.randrange(1, 5) for _ in range(draw.randrange(4))),
            dtype=dtype,
            rank=draw.choice([None, 1, 3, 16]),
            adapter_dtype=draw.choice([dtype, torch.float32]),
            bias=draw.random() < 0.5,
            seed=trial,
        )
        without = [name for name in ARGUMENTS if draw.random() < 0.3]
        if len(without) == 5 or all(tensors[n] is None for n in ARGUMENTS if n not in without):
            without = []
        check(
            tensors,
            scale,
            draw.choice([0.0, 0.5, 2.0, -1.0]),
            device,
            without=without,
            elementwise=draw.random() < 0.3,
            row_offset=draw.randrange(2**32 - 64),
            col_offset=draw.randrange(2**34 - 130),
            scratch_bytes=draw.choice([None, None, 4096, 1 << 20]),
        )


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (7, 1), (0, 5), (5, 0)])
def test_small_and_empty_weights(device, m, n):
    tensors, scale = make(m, n, (4,), rank=2)
    check(tensors, scale, 2.0, device)


def test_float64_finite_differences(device, implementation):
    tensors, scale = make(5, 6, (3,), dtype=torch.float64, rank=2)
    inputs = leaves(tensors, device)
    if not implementation.float64:
        with pytest.raises((ValueError, RuntimeError), match="float64"):
            flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        return

    def function(*arguments):
        return flatkern.ops.noisy_linear(*arguments, 2.0, scale.to(device), make_key(device))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_float64_gradients_are_exact(device, implementation):
    if not implementation.float64:
        pytest.skip("float64 runs on the reference")
    tensors, scale = make(17, 29, (2, 5), dtype=torch.float64, rank=4)
    fused, _, exact = run_all(tensors, scale, 2.0, device)
    torch.testing.assert_close(fused[0], exact[0], rtol=1e-12, atol=1e-13)
    for name, gradient in fused[1].items():
        torch.testing.assert_close(gradient, exact[1][name], rtol=1e-12, atol=1e-12)
    # Chain rule: B^T dB = dA A^T for every loss, noisy or not.
    left = tensors["lora_B"].T @ fused[1]["lora_B"]
    right = fused[1]["lora_A"] @ tensors["lora_A"].T
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_factor_gradients_satisfy_their_identity(device):
    tensors, scale = make(64, 96, (20,), rank=8)
    (_, fused), _, _ = run_all(tensors, scale, 2.0, device)
    left = tensors["lora_B"].double().T @ fused["lora_B"].cpu().double()
    right = fused["lora_A"].cpu().double() @ tensors["lora_A"].double().T
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * left.abs().max().item())


def test_gradient_of_the_weight_is_that_of_the_noisy_product(device):
    tensors, scale = make(12, 15, (8,), rank=None, bias=False)
    weight = tensors["weight"].to(device).requires_grad_()
    x = tensors["x"].to(device)
    y = flatkern.ops.noisy_linear(
        x, weight, None, None, None, 1.0, scale.to(device), make_key(device), elementwise=True
    )
    cotangent = torch.ones_like(y)
    y.backward(cotangent)
    expected = cotangent.double().T @ x.double()
    tolerances.assert_within(
        weight.grad, expected, 8 * tolerances.ulp(expected.abs().max(), x.dtype)
    )
