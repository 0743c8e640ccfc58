"""lora_plus_groups, and the plain factors of AdaLoRA against PEFT's layer."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from flatkern.nn import (
    BDALinear,
    DoRALinear,
    LoRALinear,
    NoRALinear,
    adalora_factors,
    lora_plus_groups,
    replace_linear,
)


@pytest.mark.parametrize(
    ("layer", "second"),
    [
        (LoRALinear, "lora_B"),
        (DoRALinear, "lora_B"),
        (NoRALinear, "nora_B"),
        (BDALinear, "lora_B"),
    ],
)
def test_b_learns_faster(layer, second):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    replace_linear(model, ["0", "1"], r=2, layer=layer)
    model[2].requires_grad_(True)
    groups = lora_plus_groups(model, lr=1e-3, ratio=8)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    expected = {
        name: 8e-3 if name.endswith(second) else 1e-3
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    assert {"2.weight", f"0.{second}"} < expected.keys()
    assert {n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates} == expected


def test_one_step_of_sgd_and_the_default_ratio():
    model = nn.Sequential(LoRALinear(6, 5, r=2, init_lora_weights=False))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(torch.ones(3, 6)).square().sum().backward()
    torch.optim.SGD(lora_plus_groups(model, lr=1e-3)).step()
    for name, rate in (("0.lora_A", 1e-3), ("0.lora_B", 16e-3)):
        value = model.get_parameter(name)
        torch.testing.assert_close(value.detach(), before[name] - rate * value.grad)


def test_nothing_but_b():
    model = nn.Sequential(LoRALinear(6, 5))
    model[0].lora_A.requires_grad_(False)
    (group,) = lora_plus_groups(model, lr=1)
    assert group["lr"] == 16
    assert [id(p) for p in group["params"]] == [id(model[0].lora_B)]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 0.0}, ValueError),
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": "1"}, TypeError),
        ({"ratio": 0}, ValueError),
        ({"ratio": float("inf")}, ValueError),
        ({"ratio": None}, TypeError),
        ({"model": 3}, TypeError),
        ({"model": nn.Linear(3, 2)}, ValueError),
        ({"model": nn.Sequential(LoRALinear(3, 2)).requires_grad_(False)}, ValueError),
    ],
    ids=str,
)
def test_bad_arguments(options, error):
    (name,) = options
    with pytest.raises(error, match=name):
        lora_plus_groups(**{"model": LoRALinear(3, 2), "lr": 1.0, **options})


@pytest.mark.parametrize("alpha", [8, 0.0])
def test_adalora_is_pefts_layer(alpha):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        target_modules=["0"], init_r=6, target_r=3, lora_alpha=alpha, total_step=10
    )
    layer = get_peft_model(nn.Sequential(nn.Linear(9, 7)), config).base_model.model[0].double()
    own = {name: getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_E")}
    with torch.no_grad():
        for value in own.values():
            value.normal_(std=0.5)
        # As the allocator masks what it prunes.
        own["lora_E"][[1, 4]] = 0
    ranknum = layer.ranknum["default"]
    lora_A, lora_B, scaling = adalora_factors(**own, lora_alpha=alpha, ranknum=ranknum)
    torch.testing.assert_close(scaling * lora_B @ lora_A, layer.get_delta_weight("default"))
    assert not lora_A[[1, 4]].any()
    x = torch.randn(5, 9, dtype=torch.float64)
    base = layer.base_layer
    expected = F.linear(x, base.weight + scaling * lora_B @ lora_A, base.bias)
    torch.testing.assert_close(layer(x), expected)
    # Differentiable in all three.
    (scaling * lora_B @ lora_A).sum().backward()
    assert all(value.grad is not None for value in own.values())
