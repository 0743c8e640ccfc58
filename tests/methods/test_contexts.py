"""Contexts that change a model and exactly undo it."""

import pytest
import tolerances
import torch
from torch import nn

from flatkern.methods._contexts import kept, still_statistics
from flatkern.nn.calibration import evaluating


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_kept_brings_every_bit_back(error):
    nan = torch.tensor([0x7FC12345, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    tensors = [nan, torch.tensor(2.0, dtype=torch.bfloat16), nn.Parameter(torch.ones(2, 3).t())]
    before = [tensor.detach().clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]

    def change():
        with kept(tensors):
            for tensor in tensors:
                tensor.data.fill_(7)
            if error is not None:
                raise error

    if error is None:
        change()
    else:
        with pytest.raises(error):
            change()
    for tensor, value, version in zip(tensors, before, versions, strict=True):
        tolerances.assert_same_bits(tensor, value)
        assert tensor._version > version


def test_an_interrupted_restore_is_repeated(monkeypatch):
    weights = [torch.ones(2), torch.ones(3)]
    copy_all = torch._foreach_copy_

    def interrupted(tensors, copies):
        tensors[0].copy_(copies[0])
        monkeypatch.undo()
        raise KeyboardInterrupt

    def change():
        with kept(weights):
            for weight in weights:
                weight.fill_(5)
            monkeypatch.setattr(torch, "_foreach_copy_", interrupted)

    with pytest.raises(KeyboardInterrupt):
        change()
    assert torch._foreach_copy_ is copy_all
    for weight in weights:
        assert (weight == 1).all()


def test_a_backward_after_the_restore_raises():
    weight = nn.Parameter(torch.ones(2, 2))
    with kept([weight]):
        weight.data.mul_(2)
        loss = (torch.ones(1, 2, requires_grad=True) @ weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def norms():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3).eval(),
        nn.Sequential(nn.Unflatten(1, (3, 1)), nn.InstanceNorm1d(3, track_running_stats=True)),
    )


def test_still_statistics_change_no_output():
    model = norms()
    model[3][1] = nn.Identity()
    x = torch.randn(8, 3)
    expected, state = norms()[:3](x), {n: v.clone() for n, v in model.state_dict().items()}
    with still_statistics(model):
        got = model[:3](x)
    tolerances.assert_same_bits(got, expected)
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])
    assert [module.track_running_stats for module in model[:3]] == [True, False, True]


def test_modes_come_back_after_an_error():
    model = norms()
    with pytest.raises(ValueError), evaluating(model):  # noqa: PT011, PT012
        assert not any(module.training for module in model.modules())
        raise ValueError
    assert [module.training for module in model] == [True, True, False, True]
