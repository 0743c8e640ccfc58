"""torch.compile: whole graphs, compiled once, with the noise of each window."""

import noisy_models
import pytest
import tolerances
import torch
from noisy_models import data, make_model
from torch._dynamo.testing import CompileCounterWithBackend

import flatkern
from flatkern.nn import DoRALinear, NoRALinear

both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(forward, model, x):
    loss = forward(x).square().mean()
    loss.backward()
    grads = noisy_models.gradients(model)
    model.zero_grad()
    return [loss.detach(), *grads.values()]


@both_modes
@pytest.mark.parametrize("autocast", [False, True])
def test_one_compilation_over_20_steps(mode, autocast):
    model = make_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    noise = flatkern.WeightNoise(model, 0.4, mode=mode, schedule=flatkern.cosine_ramp(10))
    x = data()
    losses = set()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for number in range(20):
            with noise.window():
                got = step(compiled, model, x)
            assert counter.frame_count == 1
            with noise.window(step=number):
                expected = step(model, model, x)
            for mine, eager in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, eager)
            losses.add(got[0].item())
        # In bfloat16 two losses may round alike.
        assert len(losses) > 15
        clean = step(compiled, model, x)
        assert counter.frame_count == 2
        tolerances.assert_same_bits(clean[0], step(model, model, x)[0])
        with noise.window():
            step(compiled, model, x)
        step(compiled, model, x)
        assert counter.frame_count == 2


KINDS = [{"layer": DoRALinear}, {"layer": DoRALinear, "renorm": True}, {"layer": NoRALinear}]


@both_modes
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_kinds_of_adapter(kind, mode):
    model = make_model(**kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    noise = flatkern.WeightNoise(model, 0.4, mode=mode)
    for number in range(3):
        with noise.window():
            got = step(compiled, model, data())
        assert counter.frame_count == 1
        with noise.window(step=number):
            expected = step(model, model, data())
        for mine, eager in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, eager)


@both_modes
def test_one_compilation_for_any_number_of_tokens(mode):
    model = make_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    noise = flatkern.WeightNoise(model, 0.4, mode=mode)
    for rows in (8, 3, 21, 64):
        x = data(rows=rows)
        torch._dynamo.mark_dynamic(x, 0)
        with noise.window():
            got = step(compiled, model, x)
            for mine, eager in zip(got, step(model, model, x), strict=True):
                torch.testing.assert_close(mine, eager)
    assert counter.frame_count == 1


def test_compiled_by_inductor():
    # Code is generated once, for the mode whose ops the compiler has to call.
    model = make_model()
    compiled = torch.compile(model, fullgraph=True)
    with flatkern.WeightNoise(model, 0.4).window():
        got, expected = step(compiled, model, data()), step(model, model, data())
    for mine, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, eager)


@both_modes
def test_compiled_backward_after_close_raises(mode):
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with flatkern.WeightNoise(model, 0.4, mode=mode).window():
        loss = compiled(data()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
