"""Layers in scope that are never called see no virtual noise: said once, by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

import flatkern
from flatkern.nn import replace_linear
from flatkern.noise import calls


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.v_proj(F.linear(x, self.q_proj.weight, self.q_proj.bias))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x)


def make(model, targets="all-linear", **options):
    torch.manual_seed(0)
    replace_linear(model, targets)
    return model, flatkern.WeightNoise(model, 1.0, **options)


def window(model, noise):
    """The messages of one window with a forward."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with noise.window():
            model(torch.randn(2, 8))
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["both", "one"])
def test_a_layer_that_is_only_read_is_named_once(targets):
    model, noise = make(Attention(), targets)
    (message,) = window(model, noise)
    assert "no noise reached q_proj.weight" in message
    assert 'mode="inplace"' in message
    assert noise.silent == ["q_proj.weight"]
    line = next(line for line in noise.summary().splitlines() if "q_proj" in line)
    assert "never called" in line
    assert window(model, noise) == []
    with noise.window():
        model.q_proj(torch.randn(2, 8))
    assert noise.silent == []


@pytest.mark.parametrize(
    "options",
    [{"mode": "inplace"}, {"schedule": flatkern.cosine_ramp(10)}, {"scope": "trainable"}],
    ids=["inplace", "ramp", "trainable"],
)
def test_no_warning_where_noise_is_seen_or_zero(options):
    model, noise = make(Attention(), **options)
    assert window(model, noise) == []
    assert noise.silent == []


@pytest.mark.parametrize("paused", [False, True])
def test_a_window_without_a_noisy_forward_says_so_once(paused):
    """And names no layer: a forward inside paused() or on another model is none of these."""
    model, noise = make(Attention())

    def run():
        with noise.window():
            if paused:
                with noise.paused():
                    model(torch.randn(2, 8))

    with pytest.warns(UserWarning, match="forward never ran"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    assert noise.silent == []
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("options", [{"mode": "inplace"}, {"schedule": flatkern.cosine_ramp(10)}])
def test_windows_that_are_read_or_replayed_or_noiseless_may_have_no_forward(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = make(Attention(), **options)[1]
        with noise.window():
            pass
        model, noise = make(nn.Sequential(nn.Linear(8, 8)))
        for x in (torch.randn(2, 8), None):
            with noise.window():
                if x is not None:
                    model(x)


def stepping(model, noise, steps, inside=True, optimizers=None):
    """The messages of a window with so many optimizer steps."""
    optimizers = optimizers or [torch.optim.SGD([p for p in model.parameters() if p.requires_grad])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1 if inside else steps):
            with noise.window():
                for _ in range(steps if inside else 1):
                    model(torch.randn(2, 8)).sum().backward()
                    for optimizer in optimizers if inside else ():
                        optimizer.step()
            for optimizer in () if inside else optimizers:
                optimizer.step()
    return [w for w in caught if "stepped again inside one window" in str(w.message)]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_a_second_optimizer_step_in_one_window_is_said_once(mode):
    model, noise = make(nn.Sequential(nn.Linear(8, 8)), mode=mode)
    assert not stepping(model, noise, 3, inside=False)
    assert not stepping(model, noise, 1)
    (warning,) = stepping(model, noise, 3)
    assert warning.filename == __file__
    assert not stepping(model, noise, 3)
    assert not _global_optimizer_post_hooks


def test_steps_of_others_and_without_noise_are_not_said():
    model, noise = make(nn.Sequential(nn.Linear(8, 8)))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert not stepping(model, noise, 3, optimizers=[other])
    # One for each weight, as where optimizers step in backward.
    each = [torch.optim.SGD([p]) for p in model.parameters() if p.requires_grad]
    assert not stepping(model, noise, 1, optimizers=each)
    model, noise = make(nn.Sequential(nn.Linear(8, 8)), schedule=flatkern.cosine_ramp(10))
    assert not stepping(model, noise, 3)


def test_experts_without_tokens_take_a_hundred_windows(monkeypatch):
    monkeypatch.setattr(calls, "_PATIENCE", 5)
    model, noise = make(Experts())
    for _ in range(4):
        assert window(model, noise) == []
    assert len(window(model, noise)) == 1
    assert noise.silent == ["experts.1.weight", "experts.2.weight"]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_layers_have_been_called(whole):
    torch._dynamo.reset()
    model, noise = make(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    if whole:
        run = torch.compile(model, backend=backend, fullgraph=True)
    else:
        run = model
        model[1].compile(backend=backend, fullgraph=True)
    for _ in range(3):
        assert window(run, noise) == []
    assert noise.silent == []
    assert len(graphs) == 1


def test_copies_made_inside_a_window_note_nothing():
    model, noise = make(Attention())
    noise.open()
    model(torch.randn(2, 8))
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no noise reached"):
        noise.close()
    assert not model._forward_pre_hooks
    twin(torch.randn(2, 8))
