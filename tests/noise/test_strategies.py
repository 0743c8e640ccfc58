"""The standard deviation of each row's noise, against float64, and against the noise itself."""

import math

import noisy_models
import pytest
import tolerances
import torch

import flatkern


def exact_scale(strategy, layer, sigma):
    merged = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    norm = merged.norm(dim=1)
    return {
        "gaussian": torch.full_like(norm, sigma),
        "row": sigma * norm,
        "flat_lora": sigma / math.sqrt(layer.in_features) * norm,
    }[strategy]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("strategy", ["gaussian", "row", "flat_lora"])
def test_noise_has_the_scale_of_the_merged_rows(implementation, strategy, mode):
    model = noisy_models.make_model(device=implementation.device)
    layer = model[3]
    clean = layer.weight.detach().clone()
    scale = exact_scale(strategy, layer, 0.2).cpu()
    noise = flatkern.WeightNoise(model, 0.2, strategy=strategy, mode=mode)
    draws = 60
    z = []
    for step in range(draws):
        with noise.window(step=step):
            added = noisy_models.seen_weight(layer).double() - clean.double()
            z.append(added.cpu() / scale[:, None])
    z = torch.stack(z)
    # Each row's noise over its own standard deviation: mean 0 and variance 1, row by row.
    count = draws * layer.in_features
    rows = z.transpose(0, 1).flatten(1)
    assert (rows.mean(1).abs() * math.sqrt(count)).max() < tolerances.Z_SCORE
    assert ((rows.var(1) - 1).abs() * math.sqrt(count / 2)).max() < tolerances.Z_SCORE


def test_flat_lora_noise_is_sigma_times_as_long_as_the_row():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4096, 6))
    flatkern.nn.replace_linear(model, "all-linear")
    clean = model[0].weight.detach().clone()
    with flatkern.WeightNoise(model, 0.05, mode="inplace").window():
        length = (model[0].weight - clean).norm(dim=1) / clean.norm(dim=1)
    # A chi variable with 4096 degrees: relative standard deviation 1 / sqrt(2 * 4096) = 1.1 %.
    assert (length / 0.05 - 1).abs().max() < tolerances.Z_SCORE * 0.0111
