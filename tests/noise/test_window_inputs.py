"""Wrong arguments and states are refused with nothing changed; what a window says of itself."""

import math

import pytest
import torch
from noisy_models import (
    assert_clean,
    clean_weights,
    make_model,
    seen_weight,
)
from torch import nn

import flatkern
from flatkern.nn import LoRALinear, replace_linear

MODES = ("virtual", "inplace")
both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


def test_state_is_checked():
    noise = flatkern.WeightNoise(make_model(), seed=4)
    for state, error in (
        ({"seed": 1}, ValueError),
        ({"seed": 1, "step": 2, "more": 3}, ValueError),
        ({"seed": -1, "step": 2}, ValueError),
        ({"seed": 1, "step": 2.0}, TypeError),
        ({"seed": 1, "step": 2, "noise_version": 2}, ValueError),
        ([1, 2], TypeError),
    ):
        with pytest.raises(error):
            noise.load_state_dict(state)
    assert noise.state_dict() == {"seed": 4, "step": 0, "noise_version": 1}
    with noise.window():
        with pytest.raises(RuntimeError, match="while a window is open"):
            noise.state_dict()
        with pytest.raises(RuntimeError, match="while a window is open"):
            noise.load_state_dict({"seed": 1, "step": 2})


def test_summary():
    model = make_model(torch.bfloat16, targets=("1", "4"))
    noise = flatkern.WeightNoise(model, mode="inplace", restore="snapshot")
    with noise.window():
        pass
    lines = noise.summary().splitlines()
    assert lines[0].split() == ["1.weight", "bfloat16", "[16,", "12]", "tensor", "2", "inplace"]
    assert lines[1].split() == ["4.weight", "bfloat16", "[5,", "9]", "tensor", "5", "inplace"]
    assert lines[2] == (
        "2 weights, 237 elements; 148 bytes of row scales and keys, 474 bytes of clean bits"
    )
    assert len(lines) == 3
    assert "clean bits" not in flatkern.WeightNoise(model).summary()


WRONG = [
    ({"sigma": math.nan}, ValueError),
    ({"sigma": math.inf}, ValueError),
    ({"sigma": -0.1}, ValueError),
    ({"sigma": "0.1"}, TypeError),
    ({"sigma": True}, TypeError),
    ({"strategy": "lora"}, ValueError),
    ({"fisher": flatkern.Fisher()}, ValueError),
    ({"fisher": 0.1}, TypeError),
    ({"strategy": None}, TypeError),
    ({"scope": "base"}, ValueError),
    ({"mode": "in-place"}, ValueError),
    ({"restore": "copy"}, ValueError),
    ({"restore": 1}, TypeError),
    ({"ranks": "all"}, ValueError),
    ({"seed": -1}, ValueError),
    ({"seed": 2**32}, ValueError),
    ({"seed": 1.0}, TypeError),
    ({"schedule": 0.5}, TypeError),
    ({"schedule": "cosine_ramp"}, TypeError),
]


ACCEPTED = {
    "strategy": "'gaussian' or 'matrix' or 'element' or 'row' or 'flat_lora' or 'fisher'",
    "scope": "'merged' or 'origin' or 'lora' or 'full' or 'all' or 'trainable'",
    "mode": "'virtual' or 'inplace'",
    "restore": "'residual' or 'snapshot' or 'host'",
    "ranks": "'same' or 'independent'",
}


@pytest.mark.parametrize(("option", "error"), WRONG)
def test_options_are_checked(option, error):
    model = make_model()
    before = clean_weights(model)
    ((name, _),) = option.items()
    with pytest.raises(error, match=f"^WeightNoise: {name} ") as caught:
        flatkern.WeightNoise(model, **option)
    if error is ValueError:
        assert ACCEPTED.get(name, "") in str(caught.value)
    assert_clean(model, before)


def test_there_must_be_something_to_perturb():
    with pytest.raises(ValueError, match="nothing to perturb"):
        flatkern.WeightNoise(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model"):
        flatkern.WeightNoise([nn.Linear(2, 2)])
    layer = LoRALinear(3, 2)
    with flatkern.WeightNoise(layer, 0.5).window():
        assert not torch.equal(seen_weight(layer), layer.weight)


@both_modes
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"step": -1}, ValueError),
        ({"step": 2**32}, ValueError),
        ({"step": 1.0}, TypeError),
        ({"draw": -1}, ValueError),
        ({"draw": 2**16}, ValueError),
        ({"draw": 0.5}, TypeError),
    ],
    ids=str,
)
def test_open_checks_its_arguments(mode, options, error):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, mode=mode)
    with pytest.raises(error, match=next(iter(options))):
        noise.open(**options)
    assert not noise.active
    assert_clean(model, before)


@both_modes
@pytest.mark.parametrize("factor", [math.nan, math.inf, -1.0, -1e-9])
def test_what_a_schedule_returns_is_checked(mode, factor):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(
        model, mode=mode, schedule=lambda step: factor if step == 1 else 1.0
    )
    with noise.window():
        pass
    with pytest.raises(ValueError, match=r"schedule\(1\) must be finite"), noise.window():
        pass
    assert not noise.active
    assert_clean(model, before)


def test_an_explicit_step_continues_past_a_failed_one():
    noise = flatkern.WeightNoise(make_model())
    noise.load_state_dict({"seed": 0, "step": 2**32 - 1})
    with noise.window():
        pass
    with pytest.raises(ValueError, match="step"):
        noise.open()
    with noise.window(step=0):
        pass


def test_a_weight_that_the_ops_refuse_is_an_error_at_open():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    model[1].weight = nn.Parameter(torch.randn(6, 4).t())
    replace_linear(model, "all-linear")
    before = clean_weights(model)
    for mode in MODES:
        noise = flatkern.WeightNoise(model, mode=mode)
        with pytest.raises(ValueError, match="unit column stride"):
            noise.open()
        assert not noise.active
        assert_clean(model, before)
