"""Merging PEFT's adapters in a pause of a window, and bases that change after `attach`."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from quantized_bases import BNB, quantize, storages
from quantized_models import NAMES, Two, batch, layers, two
from tiny import bits, fill, same_bits
from torch import nn

from flatkern.integrations.peft import attach, detach

MODES = pytest.mark.parametrize("mode", ["virtual", "inplace"])
SIGMA = 0.3
# By the window where it knows the kind of weight, else by the layer.
CHANGED = r"after (this object was made|attach).*(detach, then attach|attach\(model\)) again"


def lora(dtype=torch.float32, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(NAMES)} | options
    model = get_peft_model(Two(dtype), LoraConfig(**options))
    fill(model)
    return model


def adalora():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=list(NAMES))
    model = get_peft_model(Two(), config)
    fill(model)
    return model


def two_adapters():
    model = lora()
    model.add_adapter("more", LoraConfig(r=2, target_modules=list(NAMES)))
    model.base_model.set_adapter(["default", "more"])
    fill(model)
    return model


MODELS = {
    "lora": lora,
    "bfloat16": lambda: lora(torch.bfloat16),
    "dora": lambda: lora(use_dora=True),
    "adalora": adalora,
    "two adapters": two_adapters,
    "bias": lambda: lora(target_modules=["first"], lora_bias=True),
}
EVERY_MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def assert_noise_returns(model, mode, merge):
    """Merged is W', unmerged W to the bit, and the window's noise is what it was."""
    x = batch(next(model.parameters()).dtype)
    noise = attach(model, SIGMA, mode=mode)
    clean, before = model(x), bits(model)
    with noise.window():
        noisy = model(x)
        with noise.paused():
            merge(model)
            merged = model(x)
            weight = layers(model)[0].base_layer.weight
            assert not torch.equal(weight, before["base_model.model.first.base_layer.weight"])
            model.unmerge_adapter()
            assert same_bits(bits(model), before)
            assert torch.equal(model(x), clean)
        assert torch.equal(model(x), noisy)
        assert not torch.equal(noisy, clean)
    assert same_bits(bits(model), before)
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, clean, rtol=tolerance, atol=tolerance)
    detach(model)
    assert same_bits(bits(model), before)


@MODES
@EVERY_MODEL
def test_a_pause_merges_and_unmerges(make, mode):
    assert_noise_returns(make(), mode, lambda model: model.merge_adapter())


@MODES
def test_the_options_of_merging(mode):
    assert_noise_returns(lora(), mode, lambda model: model.merge_adapter(safe_merge=True))
    only = {"adapter_names": ["default"]}

    def one_after_the_other(model):
        model.merge_adapter(**only)
        model.merge_adapter(adapter_names=["more"])

    model = two_adapters()
    assert_noise_returns(model, mode, one_after_the_other)


@MODES
def test_noise_that_is_shown_is_never_merged(mode):
    model = lora()
    before = bits(model)
    noise = attach(model, SIGMA, mode=mode)
    with noise.window():
        for act in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match=r"inside a noise window; use paused\(\)"):
                act()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("form", BNB)
def test_a_quantised_base_comes_back(form):
    model = two(form)
    noise = attach(model, SIGMA)
    clean, before = model(batch()), storages(model)
    with noise.window():
        noisy = model(batch())
        with noise.paused():
            model.merge_adapter()
            model.unmerge_adapter()
            assert torch.equal(model(batch()), clean)
        assert torch.equal(model(batch()), noisy)
    after = storages(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def relative_error(site_layer, parts):
    """Of the row scale that an open window has, against float64."""
    weight = site_layer.base_layer.weight.detach().double()
    for lora_A, lora_B, scaling in parts:
        weight = weight + scaling * lora_B.detach().double() @ lora_A.detach().double()
    c = SIGMA / weight.shape[1] ** 0.5 * weight.norm(dim=1)
    return ((site_layer._flatkern_site._window.row_scale.double() - c).abs() / c).max().item()


def parts_of(layer, names):
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
        for name in names
    ]


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16], ids=str)
def test_the_scale_of_several_adapters(adapters, second):
    model = lora(torch.bfloat16, lora_alpha=7)
    model.add_adapter("b", LoraConfig(r=6, lora_alpha=5, use_rslora=True, target_modules=["first"]))
    model.add_adapter("c", LoraConfig(r=2, lora_alpha=3, target_modules=["first"]))
    layer = layers(model)[0]
    for name, dtype in (("default", adapters), ("b", second), ("c", adapters)):
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)
        nn.init.normal_(layer.lora_B[name].weight, std=0.3)
    model.base_model.set_adapter(["default", "b", "c"])
    layer.set_scale("b", 1.7)
    layer.scaling["c"] = torch.tensor(1.3)
    noise = attach(model, SIGMA)
    with noise.window():
        assert relative_error(layer, parts_of(layer, ["default", "b", "c"])) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_adalora(dtype):
    model = adalora()
    layer = layers(model)[0]
    for name in ("lora_A", "lora_B", "lora_E"):
        values = getattr(layer, name)
        values["default"] = nn.Parameter(torch.randn_like(values["default"]).to(dtype))
    noise = attach(model, SIGMA)
    lora_A, lora_B, lora_E = (getattr(layer, f"lora_{part}")["default"] for part in "ABE")
    scaling = float(layer.scaling["default"]) / (float(layer.ranknum["default"]) + 1e-5)
    with noise.window():
        part = lora_A.double() * lora_E.double(), lora_B, scaling
        assert relative_error(layer, [part]) < 1e-6


def test_a_base_that_is_quantised_after_attach_is_refused():
    model = lora()
    noise = attach(model, SIGMA)
    quantize(model, "torchao-int8", [f"base_model.model.{name}.base_layer" for name in NAMES])
    with pytest.raises(RuntimeError, match=CHANGED):
        noise.open()
    assert not noise.active
    detach(model)
    with attach(model, SIGMA).window():
        model(batch()).sum().backward()


@pytest.mark.parametrize("change", ["another", "integers", "bnb"])
def test_other_changes_of_a_base_are_refused(change):
    model = lora()
    noise = attach(model, SIGMA)
    layer = layers(model)[0]
    if change == "another":
        layer.base_layer = nn.Linear(64, 128)
    elif change == "integers":
        layer.base_layer.weight = nn.Parameter(torch.ones(128, 64).int(), requires_grad=False)
    else:
        quantize(model, "bnb-nf4", ["base_model.model.first.base_layer"])
    with pytest.raises(RuntimeError, match=CHANGED):
        noise.open()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_after_attach_is_no_change(dtype):
    model = lora()
    noise = attach(model, SIGMA)
    model.to(dtype)
    with noise.window():
        model(batch(dtype)).sum().backward()
