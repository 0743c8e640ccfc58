"""BDALinear: LoRA at its start, closed forms, and the scale of W' (windows: test_window_kinds)."""

import copy

import pytest
import tolerances
import torch
from torch import nn

import flatkern
from flatkern.nn import BDALinear, LoRALinear

SQUARE = pytest.mark.parametrize("square", [False, True], ids=["diagonal", "square"])


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa"])
@SQUARE
def test_the_start_is_that_of_lora_bit_for_bit(square, init):
    linear = nn.Linear(20, 14)
    found = []
    for kind, options in ((LoRALinear, {}), (BDALinear, {"square": square})):
        torch.manual_seed(1)
        layer = kind.from_linear(copy.deepcopy(linear), r=4, init_lora_weights=init, **options)
        model = nn.Sequential(layer)
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
        for window in (None, flatkern.WeightNoise(model, 0.3)):
            with window.window() if window else torch.enable_grad():
                y = model(x)
                y.square().sum().backward()
            found.append([y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
            model.zero_grad()
        found[-1].append(layer.merged_weight())
        found[-1].append(layer.weight.detach())
    for one, other in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            # Products with the identity are exact; dA = 1 dA.
            assert torch.equal(a, b)


@SQUARE
def test_gradients_are_the_closed_forms(square):
    layer = BDALinear(20, 14, r=6, lora_alpha=9, square=square, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_D.normal_()
    shapes = {name: list(value.shape) for name, value in layer.adapters().items()}
    assert shapes == {
        "lora_A": [6, 20],
        "lora_B": [14, 6],
        "lora_D": [6, 6] if square else [6],
    }
    assert all(value.requires_grad for value in layer.adapters().values())
    assert ("square=True" in repr(layer)) is square
    x = torch.randn(7, 20, dtype=torch.float64)
    layer(x).square().sum().backward()
    with torch.no_grad():
        A, B, s = layer.lora_A, layer.lora_B, 9 / 6
        D = layer.lora_D if square else layer.lora_D.diag()
        y = x @ (layer.weight + s * B @ D @ A).T + layer.bias
        g = (2 * y).T @ x
        inner = s * B.T @ g @ A.T
        expected = {
            "lora_A": s * D.T @ B.T @ g,
            "lora_B": s * g @ A.T @ D.T,
            "lora_D": inner if square else inner.diagonal(),
        }
    for name, value in expected.items():
        tolerances.assert_within(getattr(layer, name).grad, value, 1e-12 * value.abs().max())


def test_a_gate_of_zero_leaves_a_rank_out():
    layer = BDALinear(6, 5, r=3, init_lora_weights=False)
    smaller = LoRALinear(6, 5, r=2, lora_alpha=layer.scaling * 2)
    with torch.no_grad():
        layer.lora_D[1] = 0
        smaller.weight.copy_(layer.weight)
        smaller.bias.copy_(layer.bias)
        smaller.lora_A.copy_(layer.lora_A[[0, 2]])
        smaller.lora_B.copy_(layer.lora_B[:, [0, 2]])
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), smaller(x))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"square": 1}, TypeError, "square"),
        ({"r_inner": 2}, TypeError, "r_inner"),
        ({"init_lora_weights": "svd"}, ValueError, "BDALinear: init_lora_weights must be another"),
    ],
)
def test_options_are_checked(options, error, text):
    linear = nn.Linear(12, 10)
    with pytest.raises(error, match=text):
        BDALinear.from_linear(linear, **options)
    assert linear.weight.requires_grad
