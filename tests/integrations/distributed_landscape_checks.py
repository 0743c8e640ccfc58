"""Landscapes of a sharded model are those of the unsharded one, on every rank."""

import pytest
import torch
from on_ranks import (
    BATCH,
    CLOSE,
    CUTS,
    OUT,
    assert_same_bits,
    batch_of,
    check,
    full_state,
    make_model,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

from flatkern import landscape


def loss_of(model):
    x, y = batch_of(0)
    assert y.shape == (BATCH, 5, OUT)
    return lambda: nn.functional.mse_loss(model(x), y)


def measures(model, **options):
    """Losses at many points."""
    loss = loss_of(model)
    surface = landscape.surface_2d(model, loss, points=3, radius=0.5, **options)
    curve = landscape.radius_curve(model, loss, sigmas=[0.1, 0.3], draws=2, seed=4)
    line = landscape.surface_1d(model, loss, points=3, normalize="global", **options)
    losses = torch.cat([part.flatten() for part in (surface.loss, curve.losses, line.loss)])
    return losses, surface.in_place


@check(*CUTS, ranks=(2,))
def landscape_as_unsharded(cut, rank, folder):
    expected, _ = measures(make_model())
    model = CUTS[cut](make_model())
    before = full_state(model)
    found, in_place = measures(model)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    assert in_place == ()
    assert len(found.unique()) > 15
    assert_same_bits(full_state(model), before)


class Reading(nn.Module):
    """Reads a weight that its layer is not called for, where nothing but the root gathers it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 9)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return nn.functional.linear(hidden, self.second.weight, self.second.bias)


@check("True", "False", ranks=(2,))
def landscape_of_read_weights(reshard, rank, folder):
    expected, in_place = measures(Reading())
    assert in_place == ("second.weight",)
    model = Reading()
    fully_shard(model, reshard_after_forward=reshard == "True")
    before = full_state(model)
    found, in_place = measures(model)
    assert "second.weight" in in_place
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_same_bits(full_state(model), before)


@check("fsdp", "tp", ranks=(2,))
def landscape_refusals(cut, rank, folder):
    model = CUTS[cut](make_model())
    loss = loss_of(model)
    with pytest.raises(TypeError, match="whole"):
        landscape.hessian_trace(model, loss, probes=1)
    with pytest.raises(TypeError, match="whole"):
        landscape.worst_flatness(model, loss, draws=1)
    sampled = landscape.worst_flatness(model, loss, draws=1, ascent_steps=0)
    assert sampled.ascent is None
    # Where one rank cannot go on, none waits for it.
    path = folder / f"{cut}-nowhere" / "surface.json" if rank == 0 else folder / f"{cut}.json"
    with pytest.raises(OSError if rank == 0 else RuntimeError):
        landscape.surface_1d(model, loss, points=3, save=path)


class Stopped(BaseException):
    """As Ctrl-C."""


@check("fsdp", ranks=(2,))
def landscape_goes_on_where_it_stopped(cut, rank, folder):
    model = CUTS[cut](make_model())
    loss, calls = loss_of(model), []

    def stopping():
        calls.append(None)
        if len(calls) == 6:
            raise Stopped
        return loss()

    path = folder / "resumed.json"
    with pytest.raises(Stopped):
        landscape.surface_2d(model, stopping, points=3, save=path)
    whole = landscape.surface_2d(model, loss, points=3)
    torch.distributed.barrier()
    assert int(landscape.Surface.load(path).done.sum()) == 3
    found = landscape.surface_2d(model, stopping, points=3, save=path)
    assert len(calls) == 6 + 2 + 5  # the centre is the plain loss
    assert torch.equal(found.loss, whole.loss)
    torch.distributed.barrier()
    assert torch.equal(landscape.Surface.load(path).loss, whole.loss)
    with pytest.raises(ValueError, match="where seed is 0, not 1"):
        landscape.surface_2d(model, loss, points=3, seed=1, save=path)
