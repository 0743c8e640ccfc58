"""What opens, pauses, advances and ends a window, and what may not outlive it."""

import contextlib
import copy
import math

import noisy_models
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
from torch.utils.checkpoint import checkpoint

import flatkern
from flatkern.nn import replace_linear

both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


@both_modes
def test_steps_and_schedule(mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.4, mode=mode, schedule=flatkern.cosine_ramp(4), seed=2)
    layer = model[1]
    assert (noise.step, noise.sigma_t, noise.active) == (0, 0.0, False)
    with noise.window():
        assert noise.active
        tolerances.assert_same_bits(seen_weight(layer), layer.weight)
    seen = []
    for step in range(1, 7):
        sigma_t = 0.4 * 0.5 * (1 - math.cos(math.pi * min(step, 4) / 4))
        assert (noise.step, noise.sigma_t) == (step, pytest.approx(sigma_t))
        expected = expected_weight(layer, noise.sigma_t, 2, step, 0, 2)
        with noise.window():
            assert (noise.step, noise.sigma_t) == (step, pytest.approx(sigma_t))
            seen.append(seen_weight(layer))
            tolerances.assert_same_bits(seen[-1], expected)
    # A step of the caller's own, at which the schedule is read, leaves the counter alone.
    with noise.window(step=1, draw=0):
        assert noise.step == 1
        tolerances.assert_same_bits(seen_weight(layer), seen[0])
    assert noise.step == 7
    noise.open(step=3)
    noise.close()
    assert noise.step == 7
    with pytest.raises(KeyError), noise.window():
        raise KeyError
    assert noise.step == 7
    noise.open()
    noise.close()
    assert noise.step == 8


@both_modes
def test_second_open_and_second_close(mode):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    noise.close()
    noise.open()
    seen = seen_weight(model[1])
    with pytest.raises(RuntimeError, match="while a window is open"):
        noise.open()
    with pytest.raises(RuntimeError, match="while a window is open"), noise.window():
        pass
    other = flatkern.WeightNoise(model, 0.3, mode="virtual")
    with pytest.raises(RuntimeError, match="inside a noise window"):
        other.open()
    assert not other.active
    other.close()
    tolerances.assert_same_bits(seen_weight(model[1]), seen)
    noise.close()
    noise.close()
    assert noise.step == 1
    assert_clean(model, before)
    with other.window():
        tolerances.assert_same_bits(seen_weight(model[1]), seen)


@both_modes
def test_merging_and_windows_exclude_one_another(mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    merged = model[1].merged_weight()
    with noise.window():
        for action in (model[1].merge, model[1].unmerge):
            with pytest.raises(RuntimeError, match="close the window"):
                action()
        tolerances.assert_same_bits(model[1].merged_weight(), merged)
    model[3].merge()
    with pytest.raises(RuntimeError, match=r"3\.weight is merged"):
        noise.open()
    assert not noise.active
    assert model[1]._window is None
    model[3].unmerge()
    with noise.window():
        pass


@both_modes
@pytest.mark.parametrize("needs_grad", [False, True])
def test_backward_after_close_raises(implementation, mode, needs_grad):
    model = nn.Sequential(nn.Linear(12, 4)).to(implementation.device)
    replace_linear(model, "all-linear")
    noisy_models.randomise_adapters(model)
    x = data(device=implementation.device).requires_grad_(needs_grad)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    with noise.window():
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # Nor is a graph from before a window run backward inside it in place.
    loss = model(x).sum()
    with noise.window():
        if mode == "inplace" and needs_grad:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_checkpointed_backward_after_close_raises():
    model = make_model()
    x = data().requires_grad_()
    with flatkern.WeightNoise(model, 0.3).window():
        loss = checkpoint(model, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError):
        loss.backward()


@both_modes
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(mode, reentrant):
    model = make_model(lora_dropout=0.3)
    x = data().requires_grad_()

    def run(forward):
        torch.manual_seed(1)
        x.grad = None
        with noise.window(step=3):
            forward(x).square().mean().backward()
        grads = noisy_models.gradients(model) | {"x": x.grad}
        model.zero_grad()
        return grads

    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    expected = run(model)
    got = run(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerances.assert_same_bits(got[name], gradient)


@both_modes
def test_micro_batches_are_one_batch_with_the_same_key(mode):
    model = make_model(torch.float64)
    x = data(torch.float64)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)

    def run(parts):
        with noise.window(step=2):
            for part in parts:
                (model(part).square().mean() / len(parts)).backward()
        grads = noisy_models.gradients(model)
        model.zero_grad()
        return grads

    whole, parts = run([x]), run(x.split(2))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-12, atol=1e-14)


@both_modes
def test_pause(mode):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    x = data()
    clean = model(x)
    with noise.paused():
        tolerances.assert_same_bits(model(x), clean)
    with noise.window():
        seen, noisy = seen_weight(model[1]), model(x)
        with noise.paused():
            assert noise.active
            tolerances.assert_same_bits(model(x), clean)
            tolerances.assert_same_bits(model[1].weight, before["1.weight"])
            with noise.paused():
                pass
            tolerances.assert_same_bits(model(x), clean)
            with pytest.raises(RuntimeError, match="while a window is open"):
                noise.open()
        tolerances.assert_same_bits(seen_weight(model[1]), seen)
        # The adapters may change meanwhile: the scale is the one of the window's opening.
        with contextlib.suppress(KeyError), noise.paused():
            noisy_models.randomise_adapters(model)
            raise KeyError
        tolerances.assert_same_bits(seen_weight(model[1]), seen)
        noisy = model(x)
        with noise.paused():
            noise.close()
        assert not noise.active
        assert not torch.equal(model(x), noisy)
    assert noise.step == 1
    for name, value in model.state_dict().items():
        if "lora" not in name:
            tolerances.assert_same_bits(value, before[name])


def test_a_graph_lives_through_a_pause_of_a_virtual_window():
    model = make_model()
    x = data()
    noise = flatkern.WeightNoise(model, 0.3)
    with noise.window(step=0):
        expected = train_step(model, x)
    with noise.window(step=0):
        loss = loss_of(model, x)
        with noise.paused():
            model(x)
        loss.backward()
    for name, gradient in noisy_models.gradients(model).items():
        tolerances.assert_same_bits(gradient, expected[name])


def test_a_graph_does_not_live_through_a_pause_in_place():
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace")
    with noise.window():
        loss = loss_of(model, data())
        with noise.paused():
            pass
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both_modes
def test_resume(mode):
    def run(steps, state=None):
        model = make_model()
        noise = flatkern.WeightNoise(
            model, 0.4, mode=mode, seed=0 if state else 9, schedule=flatkern.cosine_ramp(6)
        )
        if state:
            noise.load_state_dict(state)
        seen = []
        for _ in range(steps):
            with noise.window():
                seen.append(seen_weight(model[1]))
        return seen, noise.state_dict()

    whole, _ = run(6)
    first, state = run(3)
    second, end = run(3, copy.deepcopy(state))
    assert state == {"seed": 9, "step": 3, "noise_version": 1}
    assert end == {"seed": 9, "step": 6, "noise_version": 1}
    for got, expected in zip(first + second, whole, strict=True):
        tolerances.assert_same_bits(got, expected)


def test_the_backend_of_the_window_is_used_to_its_end(monkeypatch):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace")
    used = []
    perturb_ = flatkern.ops.foreach_perturb_

    def watch(*args, **options):
        used.append(flatkern.build_info()["backend"])
        perturb_(*args, **options)

    monkeypatch.setattr(flatkern.ops, "foreach_perturb_", watch)
    with flatkern.backend("reference"):
        noise.open()
    with noise.paused():
        pass
    noise.close()
    assert used == ["reference"] * 2
    virtual = flatkern.WeightNoise(model, 0.3)
    with flatkern.backend("reference"):
        virtual.open()
    assert {layer._window.backend for layer in lora_layers(model)} == {"reference"}
    virtual.close()
