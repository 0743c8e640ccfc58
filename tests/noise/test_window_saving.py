"""Saving, copying and loading inside a window: clean or refused, never noisy."""

import copy
import io
import pickle

import noisy_models
import pytest
import tolerances
import torch
from noisy_models import clean_weights, data, lora_layers, make_model, seen_weight
from torch import nn

import flatkern
from flatkern.nn import replace_linear

both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


class Tied(nn.Module):
    """An adapted head whose weight is the embedding's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        replace_linear(self, ["body", "head"], r=2)
        noisy_models.randomise_adapters(self)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


def assert_state(state, before):
    assert list(state) == list(before)
    for name, value in before.items():
        tolerances.assert_same_bits(state[name], value)


@both_modes
def test_state_dict_is_clean(mode):
    model = make_model(torch.bfloat16)
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.5, mode=mode)
    with noise.window():
        state = model.state_dict()
        assert_state(state, before)
        assert_state(
            nn.ModuleDict({"x": model}).state_dict(prefix="y."),
            {f"y.x.{name}": value for name, value in before.items()},
        )
        part = model[1].state_dict()
        tolerances.assert_same_bits(part["weight"], before["1.weight"])
        tolerances.assert_same_bits(
            model.state_dict(keep_vars=True)["1.weight"], before["1.weight"]
        )
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        with noise.paused():
            assert_state(model.state_dict(), before)
        assert_state(model.state_dict(), before)
    file.seek(0)
    assert_state(torch.load(file), before)
    if mode == "inplace":
        # What was taken inside is a copy: later weights and windows do not reach it.
        with torch.no_grad():
            model[1].weight.add_(1)
        with noise.window():
            tolerances.assert_same_bits(state["1.weight"], before["1.weight"])


def test_tied_modules_all_save_the_clean_weight():
    model = Tied()
    before = clean_weights(model)
    assert set(before) >= {"embedding.weight", "head.weight"}
    noise = flatkern.WeightNoise(model, 0.5, mode="inplace")
    assert "2 weights" in noise.summary()
    with noise.window():
        assert not torch.equal(model.embedding.weight, before["embedding.weight"])
        assert_state(model.state_dict(), before)
        tolerances.assert_same_bits(
            model.embedding.state_dict()["weight"], before["embedding.weight"]
        )
    assert_state(model.state_dict(), before)


def test_a_cast_model_saves_its_own_dtype():
    model = make_model()
    before = clean_weights(model)
    with flatkern.WeightNoise(model, 0.5, mode="inplace", restore="snapshot").window():
        model.bfloat16()
        saved = model.state_dict()["1.weight"]
        tolerances.assert_same_bits(saved, before["1.weight"].bfloat16())


COPIES = [
    copy.deepcopy,
    copy.copy,
    lambda module: pickle.loads(pickle.dumps(module)),
    lambda module: torch.save(module, io.BytesIO()),
]


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("part", ["", "1", "4"])
def test_copying_in_place_is_refused(make_copy, part):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.5, mode="inplace")
    with noise.window():
        # A shallow copy shares everything with the module: there is nothing to refuse.
        if make_copy is not copy.copy:
            with pytest.raises(RuntimeError, match="in-place noise is written"):
                make_copy(model.get_submodule(part))
        with noise.paused():
            make_copy(model.get_submodule(part))
    assert_state(model.state_dict(), before)
    make_copy(model)


@pytest.mark.parametrize("make_copy", COPIES[:3])
def test_a_copy_of_a_virtual_window_is_outside_of_it(make_copy):
    model = make_model()
    x = data()
    clean = model(x)
    noise = flatkern.WeightNoise(model, 0.5)
    with noise.window():
        other = make_copy(model[1] if make_copy is copy.copy else model)
    if make_copy is copy.copy:
        assert other._window is None
        return
    with noise.window():
        tolerances.assert_same_bits(other(x), clean)
        assert not torch.equal(model(x), clean)
        with flatkern.WeightNoise(other, 0.5).window():
            pass
    assert_state(other.state_dict(), clean_weights(model))


def test_loading_in_place_is_refused():
    # It would be undone when the window closes.
    model = make_model()
    before = clean_weights(model)
    other = {name: value + 1 for name, value in before.items()}
    with flatkern.WeightNoise(model, 0.5, mode="inplace").window():
        for module, state in (
            (model[1], {"weight": other["1.weight"]}),
            (model, {"1.weight": other["1.weight"]}),
        ):
            with pytest.raises(RuntimeError, match="load_state_dict while in-place noise"):
                module.load_state_dict(state, strict=False)
    assert_state(model.state_dict(), before)
    model.load_state_dict(other)
    assert_state(model.state_dict(), other)


def test_hooks_that_ctrl_c_left_behind_do_nothing(monkeypatch):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.5, mode="inplace")
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda handle: None)
        with noise.window():
            pass
    assert model[1]._state_dict_hooks
    other = {name: value + 1 for name, value in before.items()}
    model.load_state_dict(other)
    assert_state(model.state_dict(), other)
    assert_state(copy.deepcopy(model).state_dict(), other)


@both_modes
def test_loading_by_assignment_between_windows(mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.5, mode=mode)
    with noise.window():
        pass
    other = {name: value + 1 for name, value in clean_weights(model).items()}
    model.load_state_dict(copy.deepcopy(other), assign=True)
    with noise.window():
        assert not torch.equal(seen_weight(model[1]), other["1.weight"])
    assert_state(model.state_dict(), other)


@both_modes
def test_the_window_object_can_be_copied_when_closed(mode):
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.5, mode=mode, schedule=flatkern.cosine_ramp(2))
    with noise.window():
        for make_copy in COPIES[:3]:
            with pytest.raises(RuntimeError, match="copying or pickling while a window is open"):
                make_copy(noise)
    pairs = [copy.deepcopy((model, noise)), pickle.loads(pickle.dumps((model, noise)))]
    with noise.window():
        expected = seen_weight(model[1])
    for other_model, other in pairs:
        with other.window():
            assert other.step == 1
            tolerances.assert_same_bits(seen_weight(other_model[1]), expected)
            loss = other_model(data()).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both_modes
def test_nothing_is_added_to_the_state_dict(mode):
    model = make_model()
    names = list(model.state_dict())
    noise = flatkern.WeightNoise(model, mode=mode)
    assert list(model.state_dict()) == names
    with noise.window():
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_buffers()] == []
    assert list(model.state_dict()) == names
    assert len(lora_layers(model)) == 3
