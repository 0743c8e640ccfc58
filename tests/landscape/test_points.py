"""Losses at points around the weights: right wherever code uses a weight, and everything as found.

What is expected is the loss with W + x V1 + y V2 written into the weights by hand.
"""

import random

import numpy
import pytest
import torch
from quadratics import MODELS, bits, made
from torch import nn

import flatkern
from flatkern import landscape
from flatkern._memory import peak_bytes

IN_PLACE = {
    "reader": ("read.weight",),
    "both": ("layer.weight",),
    "attention": ("attention.out_proj.weight",),
}


def directions(model, plane):
    """V1 and V2 of each weight, by the definition, in float64; independent of the package's."""
    numbers = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    found = {}
    for name in plane.names:
        weight = model.get_parameter(name).detach().double()
        rows = by_row(model, name, weight)
        z, y = (
            by_row(
                model,
                name,
                flatkern.ops.noise(
                    weight.shape[0],
                    weight[0].numel(),
                    flatkern.NoiseKey(plane.seed, 2**32 - 1, draw, numbers[name]).to("cpu"),
                )
                .double()
                .view(weight.shape),
            )
            for draw in plane.draws
        )
        length = rows.norm(dim=1, keepdim=True)
        first = z * length / z.norm(dim=1, keepdim=True)
        rest = y - (y * z).sum(1, keepdim=True) / z.square().sum(1, keepdim=True) * z
        second = rest * length / rest.norm(dim=1, keepdim=True)
        found[name] = tuple(from_rows(model, name, v, weight.shape) for v in (first, second))
    return found


def is_transposed(model, name):
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose1d)


def by_row(model, name, weight):
    """[outputs, inputs of each]."""
    if not is_transposed(model, name):
        return weight.reshape(weight.shape[0], -1)
    groups = model.get_submodule(name.rpartition(".")[0]).groups
    split = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(model, name, rows, shape):
    if not is_transposed(model, name):
        return rows.view(shape)
    groups = model.get_submodule(name.rpartition(".")[0]).groups
    split = rows.view(groups, shape[1], shape[0] // groups, *shape[2:])
    return split.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_moved_weights(name):
    model, loss = made(name)
    surface = landscape.surface_2d(model, loss, points=3, radius=0.4, seed=7)
    assert surface.in_place == IN_PLACE.get(name, ())
    moved = directions(model, landscape.Plane(model, seed=7))
    assert moved
    model.eval()
    clean = bits(model)
    for i, a in enumerate(surface.coordinates.tolist()):
        for j, b in enumerate(surface.coordinates.tolist()):
            with torch.no_grad():
                for weight, (first, second) in moved.items():
                    parameter = model.get_parameter(weight)
                    parameter.copy_(clean[weight] + a * first + b * second)
                expected = float(loss())
            # Coefficients and sums are rounded to float32; the loss is smooth.
            assert float(surface.loss[i, j]) == pytest.approx(expected, rel=2e-5), (i, j)


@pytest.mark.parametrize("name", MODELS)
def test_the_centre_is_the_loss_to_the_bit_and_everything_is_as_found(name):
    model, loss = made(name)
    model.train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    before, versions = bits(model), [p._version for p in model.parameters()]
    parameters, hooks = list(model.parameters()), hooks_of(model)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    surface = landscape.surface_2d(model, loss, points=3)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert hooks_of(model) == hooks
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unwritten = [p._version for p in model.parameters()] == versions
    assert unwritten != (name in IN_PLACE)
    model.eval()
    with torch.no_grad():
        assert float(loss()) == surface.plain == float(surface.loss[1, 1])


def hooks_of(model):
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]


class Stopped(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("kind", [ValueError, Stopped])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_ends_it_leaves_the_weights(name, kind):
    model, loss = made(name)
    before, parameters = bits(model), list(model.parameters())
    last = [m for m in model.modules() if not list(m.children())][-1]
    calls = 0

    def broken():
        nonlocal calls
        calls += 1
        if calls < 5:
            return loss()
        # In the middle of a forward: after the layers before the last.
        handle = last.register_forward_pre_hook(raising)
        try:
            loss()
            raise kind  # torch's attention does not call its last module
        finally:
            handle.remove()

    def raising(module, args):
        raise kind

    with pytest.raises(kind):
        landscape.surface_2d(model, broken, points=3)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks_of(model) == [(0, 0)] * len(list(model.modules()))
    assert all(module.training for module in model.modules())


def test_every_point_sees_the_same_random_numbers():
    model, loss = made("mlp")

    def noisy_loss():
        return loss() + torch.rand(()) + random.random() + numpy.random.rand()

    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    surface = landscape.surface_1d(model, noisy_loss, points=3, radius=1e-9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert float(surface.loss.max() - surface.loss.min()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model, loss = made("mlp", dtype)
    surface = landscape.surface_2d(model, loss, points=3, radius=0.5)
    assert surface.loss.isfinite().all()
    assert surface.loss.unique().numel() > 5


def test_a_compiled_model_is_written_in_place():
    model, _ = made("mlp")
    x = torch.ones(4, 6)
    compiled = torch.compile(model, backend="eager")
    expected = landscape.surface_1d(model, lambda: model(x).square().mean(), points=3)
    found = landscape.surface_1d(compiled, lambda: compiled(x).square().mean(), points=3)
    assert set(found.in_place) >= {"0.weight", "3.weight"}
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)


def test_one_layer_at_a_time():
    torch.manual_seed(0)
    size, layers = 256, 6
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(layers)])
    x = torch.ones(2, size)

    def loss():
        return model(x).square().mean()

    with torch.no_grad():
        plain = peak_bytes(loss, "cpu")
    # The first run also imports; what it allocates once is not of the surface.
    landscape.surface_2d(model, loss, points=3)
    peak = peak_bytes(lambda: landscape.surface_2d(model, loss, points=3), "cpu")
    layer = size * size * 4
    # Panels of the plane's Gram sums take some MiB, the same for any model.
    panels = 8 * 2**20
    assert plain < layer
    assert peak <= plain + layer + panels
    points = landscape.Plane(model)
    peak = peak_bytes(lambda: landscape.surface_2d(model, loss, points=3, plane=points), "cpu")
    assert peak <= plain + 1.1 * layer
