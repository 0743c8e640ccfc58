"""In-place windows by what keeps the clean bits: a residual, a snapshot, host memory."""

import copy

import noisy_models
import pytest
import tolerances
import torch
from noisy_models import assert_clean, clean_weights, data, make_model, seen_weight, train_step
from torch import nn

import flatkern
from flatkern.nn import replace_linear
from flatkern.noise import keep

RESTORES = ("residual", "snapshot", "host")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_restore = pytest.mark.parametrize("restore", RESTORES)


def inplace(model, sigma=0.3, **options):
    return flatkern.WeightNoise(model, sigma, mode="inplace", **options)


def keepers(noise):
    return [state.keeper for state in noise._states]


def skip_without(implementation, restore):
    if restore == "residual" and not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")


@every_restore
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_noise_and_the_same_bits_afterwards(implementation, restore, dtype):
    skip_without(implementation, restore)
    model = make_model(dtype, implementation.device)
    before, x = clean_weights(model), data(dtype, implementation.device)
    virtual, noise = flatkern.WeightNoise(model, 0.3), inplace(model, restore=restore)
    for step in range(5):
        with virtual.window(step):
            expected = [seen_weight(model[index]) for index in (1, 3, 4)]
        with noise.window(step):
            for index, weight in zip((1, 3, 4), expected, strict=True):
                tolerances.assert_same_bits(model[index].weight.detach(), weight)
            train_step(model, x)
            for name, value in model.state_dict().items():
                tolerances.assert_same_bits(value, before[name])
            with noise.paused():
                assert_values(model, before)
        assert_clean(model, before)


def assert_values(model, before):
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])


def test_the_best_of_the_backend_is_the_default(implementation):
    model = make_model(device=implementation.device)
    noise = inplace(model)
    with noise.window():
        pass
    native = implementation.residual and implementation.name != "reference"
    expected = keep.Residual if native else keep.Snapshot
    assert {type(keeper) for keeper in keepers(noise)} == {expected}


def test_a_backend_without_residuals_refuses_to_open(implementation):
    model = make_model(device=implementation.device)
    before, noise = clean_weights(model), inplace(model, restore="residual")
    if implementation.residual:
        pytest.skip("has one")
    with pytest.raises(ValueError, match="cpu, cuda and reference"):
        noise.open()
    assert not noise.active
    assert_clean(model, before)


def large_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 256, bias=False)).bfloat16()
    replace_linear(model, "all-linear", r=4)
    noisy_models.randomise_adapters(model)
    model[0].weight.data.mul_(10)
    model[0].lora_B.data.mul_(1e-3)
    return model


def held_bytes(noise):
    words = noise.summary().splitlines()[-1].split()
    assert words[-4:][1:] == ["bytes", "of", "clean"] or words[-3:] == ["of", "clean", "bits"]
    return int(words[-5].replace(",", ""))


def test_memory():
    model = large_model()
    size = model[0].weight.nbytes
    for restore, least, most in (
        ("snapshot", size, size),
        ("host", size, size),
        ("residual", 0.1 * size / 16, 0.4 * size / 16),
    ):
        noise = inplace(model, 0.15, restore=restore)
        assert held_bytes(noise) == 0
        with noise.window():
            pass
        assert least <= held_bytes(noise) <= most


def test_the_pool_is_sized_once_for_the_largest_sigma():
    model = large_model()
    before = clean_weights(model)
    noise = inplace(model, 0.15, restore="residual", schedule=flatkern.cosine_ramp(20))
    with noise.window():
        first = keepers(noise)[0]._residual
        assert noise.sigma_t == 0
    for _ in range(20):
        with noise.window():
            assert keepers(noise)[0]._residual is first
            flatkern.ops.check_residual(first)
    assert_clean(model, before)


def test_a_pool_that_is_too_small_grows():
    model = large_model()
    before = clean_weights(model)
    # Sized at the first step; a schedule may go beyond it.
    noise = inplace(model, 0.01, restore="residual", schedule=lambda step: 1 + 29 * (step > 0))
    with flatkern.WeightNoise(model, 0.3).window(1):
        expected = seen_weight(model[0])
    with noise.window():
        first = keepers(noise)[0]._residual
    with noise.window():
        second = keepers(noise)[0]._residual
        assert second.numel() > first.numel()
        tolerances.assert_same_bits(model[0].weight.detach(), expected)
    assert_clean(model, before)
    with noise.window(1):
        assert keepers(noise)[0]._residual is second
    assert_clean(model, before)


def test_only_what_lacked_room_is_perturbed_again(monkeypatch):
    model = make_model(torch.bfloat16)
    before, noise = clean_weights(model), inplace(model, 0.3, restore="residual")
    with flatkern.WeightNoise(model, 0.3).window():
        expected = [seen_weight(model[index]) for index in (1, 3, 4)]
    with noise.window(9):
        pass
    short, calls = keepers(noise)[1], []
    short._residual = flatkern.ops.new_residual(model[3].weight, 0)
    perturb_ = flatkern.ops.foreach_perturb_

    def watch(weights, *arguments, **options):
        calls.append(len(weights))
        perturb_(weights, *arguments, **options)

    monkeypatch.setattr(flatkern.ops, "foreach_perturb_", watch)
    with noise.window(0):
        for index, weight in zip((1, 3, 4), expected, strict=True):
            tolerances.assert_same_bits(model[index].weight.detach(), weight)
    assert calls == [3, 1]
    assert_clean(model, before)


def test_a_pool_grows_under_weights_that_overlap():
    base = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    clean = base.clone()
    model = nn.Sequential(*(nn.Linear(24, 16, bias=False) for _ in range(3)))
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(base[12 * index : 12 * index + 16])
    replace_linear(model, "all-linear", r=2)
    noise = inplace(model, restore="residual")
    with noise.window(0):
        expected = base.clone()
    for lacking in (0, 1, 2):
        keepers(noise)[lacking]._residual = flatkern.ops.new_residual(model[lacking].weight, 0)
        with noise.window(0):
            tolerances.assert_same_bits(base, expected)
        tolerances.assert_same_bits(base, clean)


def test_a_graph_that_captures_one_weight_leaves_the_others_checked(monkeypatch):
    """A weight whose kernels are only recorded has no header yet; the others have theirs."""
    model = make_model(torch.bfloat16)
    before, noise = clean_weights(model), inplace(model, restore="residual")
    captured = model[3].weight.data_ptr()
    monkeypatch.setattr(keep, "_is_capturing", lambda weight: weight.data_ptr() == captured)
    read_all = keep.read_all

    def read(residuals):
        assert not any(residual is keepers(noise)[1]._residual for residual in residuals)
        return read_all(residuals)

    monkeypatch.setattr(keep, "read_all", read)
    with noise.window():
        worst, small, _ = (keepers(noise)[i]._residual.numel() for i in (1, 0, 2))
        assert worst > model[3].weight.nbytes
        assert small < model[1].weight.nbytes
    assert_clean(model, before)
    keepers(noise)[0]._residual = flatkern.ops.new_residual(model[1].weight, 0)
    with noise.window():
        assert keepers(noise)[0]._residual.numel() > 136
        assert not torch.equal(model[1].weight, before["1.weight"])
    assert_clean(model, before)


def test_weights_that_cannot_be_perturbed_as_a_whole_are_not(monkeypatch):
    model = large_model()
    before, noise = clean_weights(model), inplace(model, restore="residual")
    monkeypatch.setattr(keep, "_SPARE", 0.5)
    with pytest.raises(RuntimeError, match="no room"):
        noise.open()
    assert not noise.active
    assert_clean(model, before)


CASTS = [
    lambda model: model.half(),
    lambda model: model.double(),
    lambda model: model[1].bfloat16(),
    lambda model: model[3].to("meta"),
]


@pytest.mark.parametrize("cast", CASTS)
def test_casts_inside_a_window_are_refused(cast):
    model = make_model()
    before, noise = clean_weights(model), inplace(model, restore="residual")
    with noise.window():
        with pytest.raises(RuntimeError, match='restore="snapshot" allows it'):
            cast(model)
        assert all(layer.weight.dtype == torch.float32 for layer in noisy_models.lora_layers(model))
    for name, value in model.state_dict().items():
        if "0." not in name:
            tolerances.assert_same_bits(value, before[name])
    model.half()
    before = clean_weights(model)
    with noise.window():
        assert not torch.equal(model[1].weight, before["1.weight"])
    assert_clean(model, before)


def test_a_cast_of_a_tied_module_is_refused():
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    replace_linear(model, "all-linear", r=2)
    before, noise = clean_weights(model), inplace(model, restore="residual")
    with noise.window(), pytest.raises(RuntimeError, match="casting or moving"):
        model[0].half()
    assert_clean(model, before)
    model[0].half()


def test_a_weight_that_was_written_is_not_restored():
    model = make_model()
    before, noise = clean_weights(model), inplace(model, restore="residual")
    noise.open()
    weight = model[3].weight.data
    kept = weight.clone()
    weight[0, 0] = 5.0
    with pytest.raises(RuntimeError, match="weight is not what perturb_ left"):
        noise.close()
    assert noise.active
    assert weight[0, 0] == 5.0
    tolerances.assert_same_bits(model[1].weight.detach(), before["1.weight"])
    # Put back, the window closes.
    weight.copy_(kept)
    noise.close()
    assert_clean(model, before)


def test_a_refusal_of_all_leaves_the_others_restored():
    model = make_model()
    before, noise = clean_weights(model), inplace(model, restore="residual")
    noise.open()
    scale = noise._states[1].row_scale
    kept = scale.clone()
    scale.add_(1)
    with pytest.raises(RuntimeError, match="filled with row_scale"):
        noise.close()
    for name in ("1.weight", "4.weight"):
        tolerances.assert_same_bits(model.get_parameter(name).detach(), before[name])
    scale.copy_(kept)
    noise.close()
    assert_clean(model, before)


@every_restore
def test_a_model_that_changed_between_windows(restore):
    model = make_model()
    noise = inplace(model, restore=restore)
    for change in ("half", "double", "bfloat16", "float"):
        getattr(model, change)()
        before = clean_weights(model)
        if change == "double" and restore == "residual":
            with flatkern.backend("reference"), noise.window():
                pass
        with noise.window():
            assert not torch.equal(model[1].weight, before["1.weight"])
        assert_clean(model, before)
    other = copy.deepcopy(noise)
    with other.window():
        pass
    assert_clean(model, before)
