"""A weight that something else wrote inside an in-place window: said, never undone silently."""

import pytest
import tolerances
import torch
from noisy_models import clean_weights
from torch import nn

import flatkern

RESTORES = ["snapshot", "host", "residual"]


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    return model, flatkern.WeightNoise, clean_weights(model)


def step(weight):
    torch.optim.SGD([weight], lr=0.1).step()


def no_grad_add(weight):
    with torch.no_grad():
        weight[2, 1] += 0.5


def data_copy(weight):
    weight.data.copy_(torch.ones_like(weight))


def swap_rows(weight):
    weight.data = weight.data.flip(0)


def behind_autograd(weight):
    weight.detach().numpy()[:] *= 2


def replaced(weight):
    weight.data = torch.full_like(weight, 3.0)


WRITES = [step, no_grad_add, data_copy, swap_rows, behind_autograd, replaced]


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_foreign_write_is_named_and_kept(write, restore):
    model, noise, before = make()
    noise = noise(model, 0.1, scope="trainable", restore=restore)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    noise.open()
    write(model[0].weight)
    standing = model[0].weight.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"left in 0\.weight: .*optimizer.*discard\(\)"):
            noise.close()
    assert noise.active
    for name in ("0.bias", "1.weight"):
        tolerances.assert_same_bits(model.get_parameter(name).detach(), before[name])
    assert noise.discard() == ["0.weight"]
    assert not noise.active
    if restore != "residual":  # which brings back the chunks that nobody wrote
        tolerances.assert_same_bits(model[0].weight.detach(), standing)
    # The step was not finished, and everything works again.
    assert noise.state_dict()["step"] == 0
    saved = clean_weights(model)
    with noise.window():
        assert not torch.equal(model[0].weight, saved["0.weight"])
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, saved[name])
    assert noise.step == 1


@pytest.mark.parametrize("restore", RESTORES)
def test_discard_without_a_foreign_write_restores_all(restore):
    model, noise, before = make()
    noise = noise(model, 0.1, scope="trainable", restore=restore)
    assert noise.discard() == []
    noise.open()
    assert noise.discard() == []
    assert not noise.active
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])


@pytest.mark.parametrize("restore", ["snapshot", "host"])
def test_writes_that_change_no_bit_and_casts_are_no_foreign_writes(restore):
    model, noise, before = make()
    noise = noise(model, 0.1, scope="trainable", restore=restore)
    with noise.window():
        model[0].weight.data.mul_(1.0)
        model.double()
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name].double())
    noise.open()
    model.float()
    no_grad_add(model[0].weight)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        noise.close()
    assert noise.discard() == ["0.weight"]


def test_a_training_step_inside_a_pause_is_a_step_at_clean_weights():
    model, noise, before = make()
    noise = noise(model, 0.1, scope="trainable", restore="snapshot")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with noise.window(), noise.paused():
        step(model[0].weight)
    expected = before["0.weight"] - 0.1
    tolerances.assert_same_bits(model[0].weight.detach(), expected)


@pytest.mark.parametrize("restore", RESTORES)
def test_a_pause_after_a_foreign_write_raises_too(restore):
    model, noise, _ = make()
    noise = noise(model, 0.1, scope="trainable", restore=restore)
    noise.open()
    no_grad_add(model[0].weight)
    with pytest.raises(RuntimeError, match="perturb_ left"), noise.paused():
        pass
    noise.discard()
    assert not noise.active


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_of_bits_see_one_bit(dtype):
    from flatkern.noise.keep import checksums

    for shape in ((3, 8), (3, 5), (7,), (2, 3, 4)):
        weight = torch.randn(shape).to(dtype)
        before = checksums(weight)
        assert before.shape == shape[:1]
        bits = weight.view({2: torch.int16, 8: torch.int64}[dtype.itemsize]).view(-1)
        bits[-1] ^= 1
        assert (checksums(weight) != before).sum() == 1
