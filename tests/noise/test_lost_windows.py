"""Windows whose owner is out of reach: closed by a finalizer or `flatkern.close`."""

import pytest
import torch
from noisy_models import assert_clean, clean_weights, make_model
from torch import nn

import flatkern

OPTIONS = [{"mode": "virtual"}, {"mode": "inplace"}, {"scope": "trainable"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_dropped_owner_closes_its_window(options):
    model = make_model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, **options)
    noise.open()
    owners = [noise]
    del noise
    with pytest.warns(ResourceWarning, match="dropped with its window open"):
        owners.clear()
    assert_clean(model, before)
    with flatkern.WeightNoise(model, 0.3, **options).window():
        pass


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: m[1]], ids=["m", "o", "p"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_close_needs_only_the_model(options, wrap):
    model = make_model()
    before = clean_weights(model)
    lost = flatkern.WeightNoise(model, 0.3, **options)
    lost.open()
    other = flatkern.WeightNoise(model, 0.3, **options)
    with pytest.raises(RuntimeError, match=r"another WeightNoise; .*flatkern\.close\(model\)"):
        other.open()
    if "mode" in options:
        with pytest.raises(RuntimeError, match=r"flatkern\.close\(model\)"):
            model[1].merge()
    flatkern.close(wrap(model))
    assert_clean(model, before)
    assert not lost.active
    assert lost.step == 0
    with other.window():
        pass
    flatkern.close(model)


def test_close_leaves_other_models_alone_and_can_discard():
    model, other = make_model(), make_model()
    noise = flatkern.WeightNoise(other, 0.3)
    noise.open()
    flatkern.close(model)
    assert noise.active
    flatkern.close(other)
    lost = flatkern.WeightNoise(model, 0.3, scope="trainable", restore="snapshot")
    lost.open()
    with torch.no_grad():
        model[1].lora_A.zero_()
    with pytest.raises(RuntimeError, match="discard=True"):
        flatkern.close(model)
    flatkern.close(model, discard=True)
    assert not lost.active
    assert not model[1].lora_A.any()
    with pytest.raises(TypeError, match="model"):
        flatkern.close(noise)


@pytest.mark.parametrize("scope", ["trainable", "lora"])
def test_windows_on_other_weights_may_be_open_together(scope):
    model = make_model()
    before = clean_weights(model)
    outer = flatkern.WeightNoise(model, 0.3)
    with outer.window(), flatkern.WeightNoise(model, 0.3, scope=scope).window():
        pass
    assert_clean(model, before)


def test_repr_says_what_and_where():
    noise = flatkern.WeightNoise(make_model(), 0.3, seed=4)
    assert repr(noise) == (
        "WeightNoise(sigma=0.3, strategy='flat_lora', scope='merged', mode='virtual', seed=4; "
        "3 weights, step 0, closed)"
    )
