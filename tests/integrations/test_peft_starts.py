"""Starts that move a part of W into the adapters, or choose A from data: noise is that of W'."""

import functools
import math
import types

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import peft
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import loftq_utils
from tiny import bits, same_bits
from torch import nn

import flatkern
from flatkern.integrations.peft import attach

SIGMA, R, ALPHA = 0.3, 3, 6


class Two(nn.Module):
    """Linear, tanh, linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch():
    # Features of unlike size, so that data and weights choose different directions.
    size = torch.linspace(0.1, 3, 16)
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(9)) * size


def config(start, **options):
    targets = ["first", "second"]
    return LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=start, **options
    )


def corda(method, monkeypatch):
    base, own = Two(), config("corda", corda_config=CordaConfig(corda_method=method))
    preprocess_corda(base, own, run_model=lambda: base(batch()))
    return get_peft_model(base, own)


def eva(monkeypatch):
    model = get_peft_model(Two(), config("eva", eva_config=peft.EvaConfig(rho=1.0)))
    peft.initialize_lora_eva_weights(
        model,
        [batch()] * 3,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model


def loftq(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # PEFT's own code, which names a GPU in it.
    inner = loftq_utils.loftq_init.__wrapped__
    constants = tuple("cpu" if c == "cuda" else c for c in inner.__code__.co_consts)
    code = inner.__code__.replace(co_consts=constants)
    on_cpu = torch.no_grad()(types.FunctionType(code, inner.__globals__, "loftq_init", (1,)))
    monkeypatch.setattr(lora.layer, "loftq_init", on_cpu)
    own = config("loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2})
    return get_peft_model(Two(), own)


def plain(start, monkeypatch):
    return get_peft_model(Two(), config(start))


STARTS = {
    "olora": functools.partial(plain, "olora"),
    "orthogonal": lambda monkeypatch: get_peft_model(
        Two(), LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights="orthogonal")
    ),
    "pissa_niter_4": functools.partial(plain, "pissa_niter_4"),
    "corda kpm": functools.partial(corda, "kpm"),
    "corda ipm": functools.partial(corda, "ipm"),
    "eva": eva,
    "loftq": loftq,
}


def layers(model):
    return model.base_model.model.first, model.base_model.model.second


def parts(layer):
    """The base, s, A and B in float64."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer.weight.detach().double()
    return base, layer.scaling["default"], A.detach().double(), B.detach().double()


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("start", STARTS)
def test_the_scale_is_that_of_the_merged_weight(start, mode, monkeypatch):
    model = STARTS[start](monkeypatch)
    before, seen = bits(model), []
    noise = attach(model, SIGMA, seed=3, mode=mode)
    for number, layer in zip((0, 2), layers(model), strict=True):
        base, s, A, B = parts(layer)
        rows, cols = base.shape
        c = SIGMA / math.sqrt(cols) * (base + s * B @ A).norm(dim=1)
        key = flatkern.NoiseKey(seed=3, tensor=number).to("cpu")
        seen.append(base + c[:, None] * flatkern.ops.noise(rows, cols, key) + s * B @ A)
    x, first = batch(), layers(model)[0]
    with noise.window():
        result = model(x)
    inner = torch.tanh(x.double() @ seen[0].t() + first.base_layer.bias.double())
    torch.testing.assert_close(result.double(), inner @ seen[1].t(), rtol=1e-4, atol=1e-4)
    assert same_bits(bits(model), before)


def covariance(x):
    """CorDA's: of the inputs over their largest, with a hundredth of the mean on the diagonal."""
    x = x.double() / x.double().max().abs()
    c = x.t() @ x
    return c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


@pytest.mark.parametrize("start", ["olora", "corda kpm", "corda ipm", "pissa_niter_4"])
def test_what_peft_moves_into_the_adapters_comes_back_in_w(start, monkeypatch):
    model, x = STARTS[start](monkeypatch), batch()
    for layer, original in zip(layers(model), (Two().first, Two().second), strict=True):
        weight = original.weight.detach().double()
        base, s, A, B = parts(layer)
        torch.testing.assert_close(base + s * B @ A, weight, rtol=1e-5, atol=1e-5)
        if start == "olora":
            q, r = torch.linalg.qr(weight)
            moved = s * q[:, :R] @ r[:R]
        elif start == "pissa_niter_4":
            # What random subspaces find is PEFT's.
            moved = s * B @ A
        else:
            c = covariance(x)
            u, sizes, vh = torch.linalg.svd(weight @ c, full_matrices=False)
            chosen = slice(-R, None) if start == "corda kpm" else slice(R)
            moved = u[:, chosen] * sizes[chosen] @ vh[chosen] @ torch.linalg.inv(c)
        torch.testing.assert_close(weight - base, moved, rtol=1e-3, atol=1e-3)
        x = torch.tanh(original(x)).detach()


def test_eva_leaves_the_base_and_takes_the_inputs_directions(monkeypatch):
    model, x = eva(monkeypatch), batch()
    for layer, original in zip(layers(model), (Two().first, Two().second), strict=True):
        base, _, A, B = parts(layer)
        assert torch.equal(base.float(), original.weight)
        assert not B.any()
        _, sizes, _ = torch.linalg.svd(x.double() - x.double().mean(0))
        torch.testing.assert_close(A @ A.t(), torch.eye(R, dtype=A.dtype), rtol=0, atol=1e-5)
        explained = ((x.double() - x.double().mean(0)) @ A.t()).square().sum()
        # Of the variance that three directions can explain; PEFT's is an incremental estimate.
        assert 0.98 * sizes[:R].square().sum() < explained <= 1.0001 * sizes[:R].square().sum()
        x = torch.tanh(original(x)).detach()


def test_loftq_s_base_is_on_the_grid_and_the_rest_in_the_adapters(monkeypatch):
    model = loftq(monkeypatch)
    import bitsandbytes as bnb

    for layer, original in zip(layers(model), (Two().first, Two().second), strict=True):
        weight = original.weight.detach()
        base, s, A, B = parts(layer)
        # Sixteen levels for each block of 64 elements.
        for block in base.float().view(-1, 64):
            assert len((block / block.abs().max()).unique()) <= 16
        plain = bnb.functional.dequantize_4bit(
            *bnb.functional.quantize_4bit(weight, quant_type="nf4")
        )
        # LoftQ minimises W - (Q + B A); PEFT's layer, and so W', multiplies B A by s besides.
        assert (weight - base - B @ A).norm() < 0.9 * (weight - plain).norm()
        delta = layer.get_delta_weight("default").detach().double()
        torch.testing.assert_close(s * B @ A, delta, rtol=1e-5, atol=1e-5)
