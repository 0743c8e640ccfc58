"""Small models with LoRA layers, and how to look at the weights that they compute with."""

import math

import tolerances
import torch
from torch import nn

import flatkern
from flatkern.nn import LoRALinear, replace_linear

# LayerNorm's weight and bias are 0 and 1, the linear layers' weights 2, 4 and 5.
TARGETS = {"1": 2, "3": 4, "4": 5}


def make_model(dtype=torch.float32, device="cpu", targets=("1", "3", "4"), **options):
    """LayerNorm and three linear layers, of which `targets` have adapters that are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(12),
        nn.Linear(12, 16),
        nn.GELU(),
        nn.Linear(16, 9, bias=False),
        nn.Linear(9, 5),
    ).to(device, dtype)
    replace_linear(model, list(targets), r=3, lora_alpha=6, **options)
    randomise_adapters(model)
    return model


def randomise_adapters(model):
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_A.normal_(std=0.3)
            layer.lora_B.normal_(std=0.3)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def clean_weights(model):
    """Copies of every parameter and buffer, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def seen_weight(layer):
    """The weight that the layer's base product uses: its output on the identity.

    The adapter and the bias are zeroed for the look, so each output is one product plus zeros.
    """
    kept = [(part, part.clone()) for part in (layer.lora_B, layer.bias) if part is not None]
    for part, _ in kept:
        part.zero_()
    seen = layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    for part, value in kept:
        part.copy_(value)
    return seen.t().contiguous()


def data(dtype=torch.float32, device="cpu", rows=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 12, generator=generator).to(device, dtype)


def loss_of(model, x):
    return model(x).float().square().mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, x):
    """Gradients of one forward and backward."""
    model.zero_grad()
    loss_of(model, x).backward()
    grads = gradients(model)
    model.zero_grad()
    return grads


def expected_weight(layer, sigma, *key):
    """W_noisy from the contract: c = sigma / sqrt(n) ||W'_i||, key (seed, step, draw, tensor)."""
    norm = flatkern.ops.row_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    c = norm * (sigma / math.sqrt(layer.in_features))
    return flatkern.ops.perturb(layer.weight.detach(), c, flatkern.NoiseKey(*key).to(c.device))


def assert_clean(model, before):
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])
    for layer in lora_layers(model):
        assert layer._window is None
