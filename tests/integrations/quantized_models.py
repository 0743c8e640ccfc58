"""A small model over quantised bases, and its layers' noisy products in float64."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantized_bases import FORMATS, quantize
from tiny import fill
from torch import nn
from torch.nn import functional as F

import flatkern

SIGMA = 0.3
SEED = 3
NAMES = ("first", "second")
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)
# One of each library, where what is tested does not depend on the format.
ONE_OF_EACH = pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4-nested", "bnb-int8"])


class Two(nn.Module):
    """Linear, tanh, linear; sizes that every format takes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128, dtype=dtype)
        self.second = nn.Linear(128, 32, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def two(form, config=None, dtype=torch.float32, **options):
    config = config or LoraConfig(r=4, lora_alpha=6, target_modules=list(NAMES), **options)
    model = get_peft_model(quantize(Two(dtype), form, NAMES), config)
    fill(model)
    return model


def layers(model):
    base = model.base_model.model
    return base.first, base.second


def batch(dtype=torch.float32, rows=5):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(9)).to(dtype)


def noisy(noise, name, weight, delta):
    """W + c z by the definition, in float64, from a dequantised weight."""
    line = next(line for line in noise.summary().splitlines() if line.startswith(name))
    number = int(line.split("tensor ")[1].split()[0])
    rows, cols = weight.shape
    c = SIGMA / math.sqrt(cols) * (weight + delta).norm(dim=1)
    key = flatkern.NoiseKey(seed=SEED, step=0, tensor=number).to("cpu")
    return weight + c[:, None] * flatkern.ops.noise(rows, cols, key).double()


def delta_of(layer):
    lora_A, lora_B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
    return layer.scaling["default"] * lora_B.detach().double() @ lora_A.detach().double()


def expected(layer, weight, x):
    """A LoRA layer's product over a weight in float64, and the gradients of the sum of its squares.

    Returns y, dX, dA, dB.
    """
    adapters = [getattr(layer, f"lora_{part}")["default"].weight for part in "AB"]
    x, lora_A, lora_B = (t.detach().double().requires_grad_() for t in (x, *adapters))
    bias = layer.base_layer.bias
    y = F.linear(x, weight, None if bias is None else bias.double())
    y = y + layer.scaling["default"] * x @ lora_A.t() @ lora_B.t()
    y.square().sum().backward()
    return y.detach(), x.grad, lora_A.grad, lora_B.grad


def found(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = [getattr(layer, f"lora_{part}")["default"].weight.grad for part in "AB"]
    return y.detach(), x.grad, *grads


def assert_close(results, references, tolerance):
    """Up to `tolerance` of the largest element."""
    for result, reference in zip(results, references, strict=True):
        atol = tolerance * reference.abs().max().item()
        torch.testing.assert_close(result.double(), reference, rtol=0, atol=atol)
