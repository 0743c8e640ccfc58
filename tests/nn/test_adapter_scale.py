"""The noise's row scale of every kind of adapter, in any dtype, within 1e-6 of float64."""

import pytest
import torch
from torch import nn

import flatkern
from flatkern.nn import (
    BDALinear,
    DoRALinear,
    LoRALinear,
    NoRALinear,
    adalora_factors,
    replace_linear,
)

SIGMA = 0.1
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "dora": {"layer": DoRALinear},
    "nora": {"layer": NoRALinear, "r_inner": 3},
    "bda": {"layer": BDALinear},
    "square bda": {"layer": BDALinear, "square": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def merged(layer):
    """W + s B A in float64."""
    part = {name: value.detach().double() for name, value in layer.named_parameters()}
    lora_A, lora_B = part["lora_A"], part["lora_B"]
    if isinstance(layer, NoRALinear):
        lora_A, lora_B = part["nora_A"] @ lora_A, lora_B @ part["nora_B"]
    if isinstance(layer, BDALinear):
        lora_A = (part["lora_D"] if layer.square else part["lora_D"].diag()) @ lora_A
    return part["weight"] + layer.scaling * lora_B @ lora_A


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_that_of_the_merged_weight(kind, dtype, cast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    replace_linear(model, ["0"], r=6, **KINDS[kind])
    layer = model[0]
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name.endswith(("_B", "_D")):
                value.normal_(std=0.3)
    if cast is not None:
        model.to(cast)
    noise = flatkern.WeightNoise(model, SIGMA)
    x = torch.randn(3, 64).to(layer.weight.dtype)
    clean = model(x)
    with noise.window():
        c = SIGMA / 8 * merged(layer).norm(dim=1)
        error = (layer._window.row_scale.double() - c).abs() / c
        assert error.max() < 1e-6
        y = model(x)
        y.float().square().sum().backward()
        assert not torch.equal(y, clean)
    assert y.dtype == clean.dtype == layer.weight.dtype
    assert isinstance(layer, LoRALinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_adalora_factors_are_wide(dtype):
    lora_A, lora_E, lora_B = (torch.randn(*s).to(dtype) for s in ((4, 16), (4, 1), (8, 4)))
    wide_A, same_B, scaling = adalora_factors(lora_A, lora_B, lora_E, 8, 4)
    exact = lora_A.double() * lora_E.double()
    torch.testing.assert_close(wide_A.double(), exact, rtol=1e-7, atol=0)
    assert same_B is lora_B
    assert scaling == 8 / (4 + 1e-5)
