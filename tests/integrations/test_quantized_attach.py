"""attach on quantised bases: what is stored is never written, and what cannot be shown is named."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, get_peft_model
from quantized_bases import BNB, TORCHAO, dense, quantize, storages
from quantized_models import (
    EVERY_FORMAT,
    NAMES,
    ONE_OF_EACH,
    SEED,
    SIGMA,
    Two,
    assert_close,
    batch,
    delta_of,
    expected,
    found,
    layers,
    noisy,
    two,
)
from torch import nn

import flatkern
from flatkern.integrations import quantized
from flatkern.integrations.peft import attach, detach


@EVERY_FORMAT
def test_the_base_is_as_it_was(form):
    model = two(form)
    with model.disable_adapter():
        clean_base = model(batch())
    clean, keys, before = model(batch()), list(model.state_dict()), storages(model)
    noise = attach(model, SIGMA)
    assert list(model.state_dict()) == keys
    for _ in range(3):
        with noise.window():
            result = model(batch())
            result.sum().backward()
            assert not torch.allclose(result, clean, atol=1e-2)
            with noise.paused():
                assert torch.equal(model(batch()), clean)
            with model.disable_adapter():
                assert torch.equal(model(batch()), clean_base)
        assert torch.equal(model(batch()), clean)
    after = storages(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.state_dict()) == keys
    detach(model)
    assert torch.equal(model(batch()), clean)
    assert not any("_flatkern_site" in module.__dict__ for module in model.modules())


@EVERY_FORMAT
def test_an_evaluation_leaves_the_base_as_it_was(form):
    # bitsandbytes repacks 4-bit weights for inference on CPUs with AVX512-BF16, and loses bits.
    model = two(form)
    flags = [
        getattr(layer.base_layer, "support_avx512bf16_for_cpu", None) for layer in layers(model)
    ]
    before = storages(model)
    noise = attach(model, SIGMA)
    model.eval()
    with torch.no_grad():
        model(batch())
    after = storages(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.train()
    with noise.window():
        model(batch()).sum().backward()
    detach(model)
    assert flags == [
        getattr(layer.base_layer, "support_avx512bf16_for_cpu", None) for layer in layers(model)
    ]


@pytest.mark.parametrize("form", BNB[:1] + TORCHAO[:1])
def test_numbers_are_those_of_the_model_before_it_was_quantised(form):
    config = LoraConfig(r=4, target_modules=list(NAMES))
    plain = attach(get_peft_model(Two(), config)).summary().splitlines()
    lines = attach(two(form)).summary().splitlines()
    assert [line.split("tensor ")[1] for line in lines[:2]] == [
        line.split("tensor ")[1] for line in plain[:2]
    ]
    assert lines[2] == plain[2]  # elements and bytes: those of [m, n]
    assert lines[0].split()[1] == {"bnb-nf4": "nf4", "torchao-int8": "Int8Tensor"}[form]


def test_a_format_that_torchao_cannot_dequantise():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    class Opaque(Int8Tensor):
        dequantize = torch.Tensor.dequantize

    layer = quantize(nn.Sequential(nn.Linear(64, 64)), "torchao-int8", ["0"])[0]
    weight = layer.weight
    data = weight.qdata, weight.scale, weight.block_size, weight.dtype
    layer.weight = nn.Parameter(Opaque(*data), requires_grad=False)
    assert quantized.stored(layer).why_not() == "torchao's Opaque, which cannot be dequantised"


@ONE_OF_EACH
def test_a_late_backward_raises(form):
    model = two(form)
    noise = attach(model, SIGMA)
    with noise.window():
        loss = model(batch()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ONE_OF_EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_noise(form, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = two(form)
        x = batch().requires_grad_()
        with attach(model, SIGMA).window():
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            else:
                y = model(x)
            y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4"])
def test_what_no_layer_shows_is_left_out(form):
    model = get_peft_model(quantize(Two(), form, NAMES), LoraConfig(r=4, target_modules=["first"]))
    noise = attach(model, SIGMA, scope="origin")
    assert not any("second" in name for name in noise.names)


@ONE_OF_EACH
def test_inplace_is_refused_and_auto_is_virtual(form):
    model = two(form)
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError, match=r"mode must be 'virtual' or 'auto' .*quantised, as .*first"
    ):
        attach(model, SIGMA, mode="inplace")
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == before
    noise, stored = attach(model, SIGMA, mode="auto"), storages(model)
    with noise.window(micro_batches=100):
        during = storages(model)
    assert all(torch.equal(stored[name], during[name]) for name in stored)


@pytest.mark.parametrize("form", ["bnb-nf4", "bnb-int8"])
@pytest.mark.filterwarnings("ignore:.*rounding errors")
def test_merging(form):
    model = two(form)
    noise = attach(model, SIGMA)
    with noise.window():
        for act in (model.merge_adapter, model.unmerge_adapter):
            with pytest.raises(RuntimeError, match="inside a noise window"):
                act()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        noise.open()
    model.unmerge_adapter()
    # It was quantised again: the new values count.
    first, _ = layers(model)
    noise.load_state_dict({"seed": SEED, "step": 0})
    shown = noisy(noise, noise.names[0], dense(first.base_layer), delta_of(first))
    with noise.window():
        results = found(first, batch())
    assert_close(results, expected(first, shown, batch()), 1e-5)


@ONE_OF_EACH
def test_a_copy_is_attached_for_itself(form):
    model = two(form)
    model(batch())
    noise = attach(model, SIGMA)
    twin = copy.deepcopy(model)
    assert layers(twin)[0]._flatkern_site.quantized.base is layers(twin)[0].base_layer
    with noise.window():
        noisy_result = model(batch())
        assert not torch.equal(twin(batch()), noisy_result)


class Unknown(nn.Linear):
    pass


def test_what_cannot_take_noise_is_named():
    pytest.importorskip("torchao", reason="torchao is not installed")
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    quantize(model, "torchao-int8", ["0"])
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: name == "1")
    model[2] = bnb.nn.Linear4bit(64, 64)
    model[3].weight = nn.Parameter(to_nf4(model[3].weight.data, 64, 64), requires_grad=False)
    model[4] = Unknown(64, 64)
    model[4].weight = nn.Parameter(torch.empty(32, 64), requires_grad=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="no noise on") as warned:
        noise = attach(model, SIGMA)
    assert [name.split(".")[2] for name in noise.names] == ["0"]
    message = str(warned[0].message)
    for number, reason in enumerate(
        (
            "torchao's Int8Tensor with quantised activations",
            "bitsandbytes' Linear4bit that is not quantised yet",
            "base weight of type NF4Tensor",
            "base layer Unknown",
        ),
        1,
    ):
        assert f"{reason}: base_model.model.{number}" in message


@pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4"])
def test_flatkern_s_own_layers_refuse_it(form):
    model = quantize(Two(), form, NAMES)
    with pytest.raises((TypeError, ValueError), match=r"first.* (Int8Tensor|Linear4bit|uint8)"):
        flatkern.nn.replace_linear(model, target_modules=["first"])


def test_a_repacked_layer_is_named():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = two("bnb-nf4")
    first, _ = layers(model)
    first.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match="has repacked .*: .*first"):
        attach(model, SIGMA)
