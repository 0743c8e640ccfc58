"""mode="auto": the rule, what it looks at, and that nobody can tell which mode it took."""

import noisy_models
import pytest
import tolerances
import torch
from noisy_models import assert_clean, clean_weights, data, lora_layers, make_model, train_step

import flatkern
from flatkern.noise import modes


@pytest.fixture(autouse=True)
def kernels(implementation):
    if not implementation.residual or implementation.name == "reference":
        pytest.skip("no kernels for residuals: auto is virtual")


def is_inplace(model):
    """Whether the open window writes the weights."""
    (mode,) = {"virtual" if layer._window.noisy else "inplace" for layer in lora_layers(model)}
    return mode == "inplace"


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    ("micro_batches", "enough"), [(1, False), (2, False), (3, True), (16, True)]
)
def test_rule(micro_batches, enough, writable):
    expected = "inplace" if enough and writable else "virtual"
    assert modes.best_mode(micro_batches, writable) == expected


def test_each_window_follows_the_rule_with_the_same_noise(device):
    model = make_model(torch.bfloat16, device)
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode="auto")
    virtual = flatkern.WeightNoise(model, 0.3)
    x = data(torch.bfloat16, device)
    for step, micro_batches in enumerate((1, 4, 2, 3)):
        with noise.window(micro_batches=micro_batches):
            assert is_inplace(model) == (micro_batches >= 3)
            with noise.paused():
                assert_clean_bits(model, before)
            assert is_inplace(model) == (micro_batches >= 3)
            got = [noisy_models.seen_weight(layer) for layer in lora_layers(model)]
            train_step(model, x)
        with virtual.window(step=step):
            expected = [noisy_models.seen_weight(layer) for layer in lora_layers(model)]
        for mine, other in zip(got, expected, strict=True):
            tolerances.assert_same_bits(mine, other)
        assert_clean(model, before)
    assert "auto" in noise.summary()
    assert "clean bits" in noise.summary()


def assert_clean_bits(model, before):
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])


def test_weights_that_others_hold_are_not_written(device):
    # In place, a tied embedding would see the noise.
    model = make_model(device=device)
    tied = torch.nn.Embedding(16, 12, device=device)
    tied.weight = model.get_submodule("1").weight
    model = torch.nn.ModuleList([model, tied])
    with flatkern.WeightNoise(model, 0.3, mode="auto").window(micro_batches=16):
        assert not is_inplace(model)


def test_weights_without_residual_kernels_are_not_copied(device):
    model = make_model(device=device)
    with flatkern.backend("reference"):
        assert not modes.all_writable(flatkern.WeightNoise(model, 0.3)._targets)
    assert modes.all_writable(flatkern.WeightNoise(model, 0.3)._targets)


def test_a_method_tells_its_micro_batches(device):
    model = make_model(device=device)
    before = clean_weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    method = flatkern.methods.FlatLoRA(model, optimizer, sigma=0.3, mode="auto")
    seen = []

    def loss_fn(x):
        seen.append(is_inplace(model))
        return model(x).square().mean()

    method.step(loss_fn, [data(device=device)] * 2)
    method.step(loss_fn, [data(device=device)] * 3)
    assert seen == [False] * 2 + [True] * 3
    assert_clean(model, before)


@pytest.mark.parametrize(("micro_batches", "error"), [(0, ValueError), (1.0, TypeError)])
def test_micro_batches_are_checked(micro_batches, error):
    noise = flatkern.WeightNoise(make_model())
    with pytest.raises(error, match="micro_batches"):
        noise.open(micro_batches=micro_batches)
    assert not noise.active
