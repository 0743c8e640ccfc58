"""The noise that a window shows: the documented bits, the same in both modes."""

import random

import noisy_models
import numpy as np
import pytest
import tolerances
import torch
from noisy_models import (
    assert_clean,
    clean_weights,
    data,
    expected_weight,
    lora_layers,
    loss_of,
    make_model,
    seen_weight,
    train_step,
)
from torch import nn

import flatkern
from flatkern.nn import LoRALinear, replace_linear

MODES = ("virtual", "inplace")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


@both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_have_the_documented_noise(implementation, dtype, mode):
    model = make_model(dtype, implementation.device, targets=("1", "4"))
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode, seed=11)
    for step, draw in ((0, 0), (5, 2), (2**32 - 1, 2**16 - 1)):
        expected = {
            name: expected_weight(model.get_submodule(name), 0.3, 11, step, draw, number)
            for name, number in noisy_models.TARGETS.items()
            if name != "3"
        }
        with noise.window(step=step, draw=draw):
            for name, weight in expected.items():
                layer = model.get_submodule(name)
                tolerances.assert_same_bits(seen_weight(layer), weight)
                assert not torch.equal(weight, before[f"{name}.weight"])
                if mode == "virtual":
                    tolerances.assert_same_bits(layer.weight, before[f"{name}.weight"])
        assert_clean(model, before)


def test_noise_itself_is_ops_noise_at_the_documented_key():
    # Scale 1 on a zero weight: what is seen is z.
    model = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    replace_linear(model, "all-linear")
    with flatkern.WeightNoise(model, 1.0, strategy="gaussian", seed=3).window(step=8, draw=1):
        z = flatkern.ops.noise(4, 7, flatkern.NoiseKey(3, 8, 1, 2).to("cpu"))
        tolerances.assert_same_bits(seen_weight(model[1]), z)


def test_tensor_numbers_do_not_depend_on_what_is_wrapped():
    for targets in (("1", "3", "4"), ("4",), ("3", "1")):
        summary = flatkern.WeightNoise(make_model(targets=targets)).summary().splitlines()
        numbers = {
            line.split(".")[0]: int(line.split("tensor ")[1].split()[0]) for line in summary[:-1]
        }
        assert numbers == {name: noisy_models.TARGETS[name] for name in targets}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_agree_with_dense_autograd(implementation, dtype):
    grads = {}
    for mode in MODES:
        model = make_model(dtype, implementation.device)
        x = data(dtype, implementation.device)
        with flatkern.WeightNoise(model, 0.3, mode=mode).window():
            grads[mode] = train_step(model, x)
            weights = [seen_weight(layer) for layer in lora_layers(model)]
    # The same model in float64, with the noisy weights written in.
    dense = make_model(torch.float64)
    with torch.no_grad():
        for source, target in zip(model.parameters(), dense.parameters(), strict=True):
            target.copy_(source)
        for layer, weight in zip(lora_layers(dense), weights, strict=True):
            layer.weight.copy_(weight)
    exact = train_step(dense, x.cpu().double())
    assert exact.keys() == grads["virtual"].keys() == grads["inplace"].keys()
    assert len(exact) == 6
    for name, gradient in exact.items():
        # Plain autograd on the same noisy weights is in place; virtual may not be much worse.
        bound = tolerances.eager_bound(grads["inplace"][name].cpu(), gradient, dtype)
        bound = max(bound, 16 * tolerances.STEP[dtype] * gradient.abs().max().item())
        for mode in MODES:
            tolerances.assert_within(grads[mode][name], gradient, bound)


def test_float64():
    model = make_model(torch.float64)
    before = clean_weights(model)
    grads = {}
    for mode in MODES:
        with flatkern.WeightNoise(model, 0.3, mode=mode).window():
            grads[mode] = train_step(model, data(torch.float64))
        assert_clean(model, before)
    for name, gradient in grads["virtual"].items():
        torch.testing.assert_close(gradient, grads["inplace"][name], rtol=1e-12, atol=1e-14)


@both_modes
def test_300_bfloat16_windows_change_no_bit(implementation, mode):
    model = make_model(torch.bfloat16, implementation.device)
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.1, mode=mode)
    moved = 0
    for step in range(300):
        with noise.window():
            if step % 30 == 0:
                moved += int((seen_weight(model[1]) != before["1.weight"]).sum())
    assert noise.step == 300
    assert moved > 0.9 * 10 * model[1].weight.numel()
    assert_clean(model, before)


@both_modes
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_no_noise_is_lora_bit_for_bit(implementation, mode, dropout, bias):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 5, bias=bias))
    replace_linear(model.to(implementation.device), "all-linear", r=3, lora_dropout=dropout)
    noisy_models.randomise_adapters(model)
    x = torch.randn(4, 6, 12).to(implementation.device)

    def run():
        torch.manual_seed(2)
        y = model(x)
        y.square().sum().backward()
        grads = noisy_models.gradients(model)
        model.zero_grad()
        return [y, *grads.values()]

    expected = run()
    with flatkern.WeightNoise(model, 0.0, mode=mode).window():
        got = run()
    for mine, clean in zip(got, expected, strict=True):
        tolerances.assert_same_bits(mine, clean)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_agree_in_and_out_of_windows_under_autocast(dtype, dropout):
    model = make_model(lora_dropout=dropout)[1].to(dtype)
    noise = flatkern.WeightNoise(nn.Sequential(model), 0.0)
    x = data().requires_grad_()

    def run():
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        grads = [x.grad, model.lora_A.grad, model.lora_B.grad]
        x.grad = model.lora_A.grad = model.lora_B.grad = None
        return [y, *grads]

    expected = run()
    assert expected[0].dtype == torch.bfloat16
    with noise.window():
        got = run()
    for mine, clean in zip(got, expected, strict=True):
        assert mine.dtype == clean.dtype
        torch.testing.assert_close(mine, clean, rtol=2e-2, atol=2e-2)
    tolerances.assert_same_bits(got[0], expected[0])


@both_modes
def test_dropout_gives_the_branch_other_numbers_than_the_base(mode):
    layer = LoRALinear(12, 8, r=3, lora_dropout=0.5, bias=False)
    noisy_models.randomise_adapters(layer)
    x = data()
    with flatkern.WeightNoise(nn.Sequential(layer), 0.3, mode=mode).window():
        weight = seen_weight(layer)
        torch.manual_seed(4)
        got = layer(x)
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x, 0.5)
    expected = x @ weight.t() + layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(got, expected)


def test_weights_that_overlap_in_memory_come_back_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight.data = model[0].weight.data
    replace_linear(model, "all-linear", r=2)
    before = clean_weights(model)
    with flatkern.WeightNoise(model, 0.5, mode="inplace").window():
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert_clean(model, before)


@both_modes
@pytest.mark.parametrize("change", ["double", "half", "bfloat16", "float"])
def test_casts_leave_the_operands_and_the_restored_values_alone(mode, change):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode, restore="snapshot")
    for inside in (False, True):
        # The cast inside a window: what comes back is the clean weight, cast.
        with noise.window():
            if inside:
                getattr(model, change)()
                model.float()
                getattr(model, change)()
            for layer in lora_layers(model):
                assert layer._window.row_scale.dtype == torch.float32
                assert layer._window.key.dtype == torch.int64
    for name, value in model.state_dict().items():
        cast = getattr(before[name], change)()
        if "lora" not in name:
            tolerances.assert_same_bits(value, cast.float().to(cast.dtype))
    with noise.window():
        assert lora_layers(model)[0]._window.row_scale.dtype == torch.float32
        assert torch.isfinite(model(data(model[1].weight.dtype))).all()


def test_operands_stay_at_their_addresses():
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3)
    addresses = set()
    for _ in range(3):
        with noise.window():
            addresses.add(
                tuple(
                    tensor.data_ptr()
                    for layer in lora_layers(model)
                    for tensor in (layer._window.row_scale, layer._window.key)
                )
            )
    assert len(addresses) == 1


@both_modes
def test_a_first_window_in_inference_mode(mode):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    with torch.inference_mode(), noise.window(step=0):
        seen = seen_weight(model[1])
        with noise.paused():
            model(data())
    assert_clean(model, before)
    with noise.window(step=0):
        tolerances.assert_same_bits(seen_weight(model[1]), seen)
        loss_of(model, data()).backward()
    assert_clean(model, before)


@both_modes
def test_no_global_generator_is_touched(mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for _ in range(2):
        with noise.window(), noise.paused():
            pass
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_noise_does_not_depend_on_the_global_seed():
    seen = []
    for seed in (1, 2):
        model = make_model()
        torch.manual_seed(seed)
        with flatkern.WeightNoise(model, 0.3).window():
            seen.append(seen_weight(model[1]))
    tolerances.assert_same_bits(*seen)


@pytest.mark.parametrize(("ranks", "word"), [("same", 7), ("independent", 3 * 2**16 + 7)])
def test_ranks(monkeypatch, ranks, word):
    model = make_model()
    expected = expected_weight(model[1], 0.3, 0, 0, word, 2)
    alone = expected_weight(model[1], 0.3, 0, 0, 7, 2)
    noise = flatkern.WeightNoise(model, 0.3, ranks=ranks)
    with noise.window(step=0, draw=7):
        tolerances.assert_same_bits(seen_weight(model[1]), alone)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    with noise.window(step=0, draw=7):
        tolerances.assert_same_bits(seen_weight(model[1]), expected)
