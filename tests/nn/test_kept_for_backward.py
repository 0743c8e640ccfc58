"""A layer in a window keeps for backward what it keeps outside one, and the key and the scale."""

import contextlib
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flatkern
from flatkern.integrations import peft as flatkern_peft
from flatkern.nn import BDALinear, DoRALinear, LoRALinear, NoRALinear

# More tokens than columns: A is kept in place of x A^T, where it is no parameter.
IN, OUT, TOKENS = 64, 48, 80


def own(kind, dropout, **options):
    model = torch.nn.Sequential(kind(IN, OUT, lora_dropout=dropout, **options))
    return model, flatkern.WeightNoise(model)


def wrapped(dropout, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=dropout, **options)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(IN, OUT)), config)
    return model, flatkern_peft.attach(model)


LAYERS = {
    "LoRALinear": functools.partial(own, LoRALinear),
    "LoRALinear bfloat16": functools.partial(own, LoRALinear, dtype=torch.bfloat16),
    "DoRALinear": functools.partial(own, DoRALinear),
    "NoRALinear": functools.partial(own, NoRALinear),
    "BDALinear": functools.partial(own, BDALinear),
    "PEFT": wrapped,
    "PEFT DoRA": functools.partial(wrapped, use_dora=True),
}


def kept(model, x, checkpointed):
    """Bytes that autograd keeps for backward beside parameters, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # Held, so that no later tensor takes its address.
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = checkpoint(model, x, use_reentrant=True) if checkpointed else model(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("mode", ["plain", "autocast", "checkpoint", "first layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", LAYERS)
def test_no_more_than_the_same_layer_outside_a_window(name, dropout, mode):
    torch.manual_seed(0)
    model, noise = LAYERS[name](dropout)
    dtype = next(model.parameters()).dtype
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    # A result of something, as the input of a layer is, which would be kept for it alone.
    x = x.detach() if mode == "first layer" else x * 1
    autocast = contextlib.nullcontext()
    if mode == "autocast":
        autocast = torch.autocast("cpu", torch.bfloat16)
    measure = functools.partial(kept, model, x, mode == "checkpoint")
    with autocast:
        outside = measure()
        with noise.window():
            inside = measure()
    # The key and the row scale.
    assert inside <= outside + 4 * OUT + 32


def test_a_frozen_weight_alone_keeps_no_activation():
    weight, scale = torch.randn(OUT, IN), torch.ones(OUT)
    x, key = torch.randn(TOKENS, IN, requires_grad=True), flatkern.NoiseKey(1).to("cpu")
    model = torch.nn.ParameterList([weight])

    def layer(x):
        return flatkern.ops.noisy_linear(x, weight, None, None, None, 1.0, scale, key)

    layer.parameters = model.parameters
    assert kept(layer, x * 1, False) <= 4 * (OUT * IN + OUT) + 32
