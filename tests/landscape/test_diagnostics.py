"""Figures of adapters against float64 and draws of noise."""

import math

import pytest
import torch
from torch import nn

import flatkern
from flatkern.landscape.diagnostics import adapter_figures
from flatkern.nn import LoRALinear, replace_linear


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    replace_linear(model, "all-linear", r=3, lora_alpha=6)
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return model, layers


def test_balance_and_conditioning():
    model, layers = model_of()
    found = adapter_figures(model)
    assert set(found) == {"balancedness", "condition_A", "condition_A_max"}
    pairs = [(p.lora_A.double().detach(), p.lora_B.double().detach()) for p in layers]
    balance = [0.5 * (b.square().sum() - a.square().sum()).item() for a, b in pairs]
    assert found["balancedness"] == pytest.approx(sum(balance) / 2, rel=1e-9)
    conditions = [torch.linalg.cond(a).item() for a, _ in pairs]
    assert found["condition_A_max"] == pytest.approx(max(conditions), rel=1e-9)
    assert found["condition_A"] == pytest.approx(math.sqrt(math.prod(conditions)), rel=1e-9)


@pytest.mark.parametrize("strategy", ["gaussian", "element", "row", "flat_lora"])
def test_sizes_of_noise_are_those_of_its_draws(strategy):
    """Root mean squares over 100 draws: of 20 numbers or more, so good to 1.6 %; 3 times that."""
    model, layers = model_of()
    sigma = 0.1
    found = adapter_figures(model, sigma=sigma, strategy=strategy)
    draws = 100
    clean = [p.weight.detach().clone() for p in layers]
    factors = [p.lora_B.detach().clone() for p in layers]
    merged = flatkern.WeightNoise(model, sigma, strategy=strategy, mode="inplace", seed=2)
    lora = flatkern.WeightNoise(model, sigma, strategy=strategy, scope="lora", seed=3)
    own = through = 0.0
    for step in range(draws):
        with merged.window(step=step):
            own += sum(
                (p.weight - w).double().square().sum().item()
                for p, w in zip(layers, clean, strict=True)
            )
        with lora.window(step=step):
            noise = [p.lora_B - b for p, b in zip(layers, factors, strict=True)]
        through += sum(
            (p.scaling * e @ p.lora_A).double().square().sum().item()
            for p, e in zip(layers, noise, strict=True)
        )
    length = sum(p.merged_weight().double().square().sum().item() for p in layers)
    assert found["noise_to_weight"] == pytest.approx(math.sqrt(own / draws / length), rel=0.05)
    assert found["noise_BA_to_W"] == pytest.approx(math.sqrt(through / own), rel=0.06)
    if strategy == "flat_lora":
        assert found["noise_to_weight"] == pytest.approx(sigma, rel=1e-6)


def test_bad_input():
    model, _ = model_of()
    with pytest.raises(ValueError, match="sigma"):
        adapter_figures(model, sigma=-1.0)
    with pytest.raises(ValueError, match="strategy"):
        adapter_figures(model, strategy="fisher")
    with pytest.raises(ValueError, match="scope 'merged'"):
        adapter_figures(nn.Linear(3, 3))
