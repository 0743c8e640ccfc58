"""A window is a few calls into the kernels, however many layers; what it made, it keeps."""

import pytest
import tolerances
import torch
from noisy_models import assert_clean, clean_weights, make_model
from torch import nn

import flatkern
from flatkern.noise import changes, state
from flatkern.ops import _lists


@pytest.fixture
def calls(monkeypatch):
    """The kernels that lists go to, in order."""
    made, kernel = [], _lists.kernel

    def watch(op, *arguments):
        made.append(op)
        return kernel(op, *arguments)

    monkeypatch.setattr(_lists, "kernel", watch)
    return made


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_few_calls(calls, mode):
    with flatkern.backend("cpu"):
        noise = flatkern.WeightNoise(make_model(torch.bfloat16), mode=mode, restore="residual")
        for _ in range(3):
            calls.clear()
            noise.open()
            written = ["foreach_perturb_"] if mode == "inplace" else []
            # The first sizes the pools.
            assert [op for op in calls if op != "perturb_"][-1 - len(written) :] == [
                "foreach_row_scale_",
                *written,
            ]
            opened = list(calls)
            noise.close()
            assert calls[len(opened) :] == ["foreach_restore_"] * len(written)
        assert opened == ["foreach_row_scale_", *written]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_weights_are_looked_at_once(monkeypatch, mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, mode=mode)
    served = []
    serve = state.State.serve
    monkeypatch.setattr(
        state.State, "serve", lambda *a: served.append(a[0].target.name) or serve(*a)
    )
    for _ in range(3):
        with noise.window():
            pass
    assert served == noise.names
    for change in (
        lambda: model.half(),
        lambda: model[3].weight.data.copy_(torch.ones(9, 16)),
        lambda: setattr(model[3].weight, "data", model[3].weight.data.clone()),
    ):
        change()
        served.clear()
        before = clean_weights(model)
        with noise.window(), torch.no_grad():
            model(torch.ones(2, 12, dtype=model[1].weight.dtype))
        assert_clean(model, before)
        assert served in ([], noise.names)
    # Written in place it is the same weight; elsewhere it is another.
    assert served == noise.names
    served.clear()
    if flatkern.build_info()["auto"]["cpu"] != "reference":
        with flatkern.backend("reference"), noise.window():
            pass
        assert served == noise.names


def test_what_is_no_parameter_is_looked_at_in_each_window():
    """Nothing is known beforehand of where it lies."""

    class Other(nn.Parameter):
        pass

    model = make_model()
    model[3].weight = Other(model[3].weight.data, requires_grad=False)
    noise = flatkern.WeightNoise(model)
    with noise.window():
        pass
    places = changes.Places(noise._targets)
    places.note()
    assert not places.still()


def test_guards_leave_no_trace():
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace")
    before = clean_weights(model)
    for _ in range(3):
        with noise.window():
            assert len(model[3]._state_dict_hooks) == 1
            for name, value in model.state_dict().items():
                tolerances.assert_same_bits(value, before[name])
            with pytest.raises(RuntimeError, match="load_state_dict while in-place noise"):
                model.load_state_dict(before)
        assert not model[3]._state_dict_hooks
        assert not model[3]._load_state_dict_pre_hooks
        assert "_apply" not in vars(model[3])
    model.load_state_dict(before)


def test_a_small_pool_has_room_for_another_key(calls):
    """What the noise of a single chunk asks for differs by chance by more than a tenth."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    flatkern.nn.replace_linear(model, "all-linear", r=2)
    with flatkern.backend("cpu"):
        noise = flatkern.WeightNoise(model, 0.05, mode="inplace")
        with noise.window():
            pass
        calls.clear()
        for _ in range(20):
            with noise.window():
                pass
    assert calls.count("foreach_perturb_") == 20
