"""torch.compile: whole graphs, compiled once, with the noise of each window."""

import noisy_models
import pytest
import tolerances
import torch
from noisy_models import data, make_model
from torch._dynamo.testing import CompileCounterWithBackend

import flatkern
from flatkern.nn import BDALinear, DoRALinear, NoRALinear

# Two layers: noise that is made again in the backward is that of a layer with one before it.
TWO = ("1", "3")
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


# In place autocast meets plain layers.
@pytest.mark.parametrize(
    ("mode", "autocast"), [("virtual", False), ("virtual", True), ("inplace", False)]
)
def test_one_compilation_for_all_steps(mode, autocast):
    model = make_model(targets=TWO)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    noise = flatkern.WeightNoise(model, 0.4, mode=mode, schedule=flatkern.cosine_ramp(10))
    x = data()
    losses = set()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        # More than dynamo compiles a frame anew for.
        for number in range(torch._dynamo.config.recompile_limit + 2):
            with noise.window():
                got = step(compiled, model, x)
            assert counter.frame_count == 1
            with noise.window(step=number):
                expected = step(model, model, x)
            for mine, eager in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, eager)
            losses.add(got[0].item())
        # In bfloat16 two losses may round alike.
        assert len(losses) > 7
        clean = step(compiled, model, x)
        assert counter.frame_count == 2
        tolerances.assert_same_bits(clean[0], step(model, model, x)[0])
        with noise.window():
            step(compiled, model, x)
        step(compiled, model, x)
        assert counter.frame_count == 2


KINDS = [{"layer": DoRALinear}, {"layer": DoRALinear, "renorm": True}, {"layer": NoRALinear}]
KINDS += [{"layer": BDALinear}]


@both_modes
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_kinds_of_adapter(kind, mode):
    model = make_model(targets=TWO, **kind)
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
    model = make_model(targets=TWO)
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


def test_the_recipe_for_a_whole_step():
    # docs/graphs.md. Inductor generates code once, for the mode whose ops it has to call and for
    # two layers, because each kernel takes seconds to compile; without a GPU there are no graphs.
    losses = []
    for compile_it in (True, False):
        torch.manual_seed(0)
        model = make_model(targets=TWO)[1:4]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        noise = flatkern.WeightNoise(model, 0.4)
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        forward = compiled if compile_it else model
        losses.append([])
        for _ in range(3):
            with noise.window():
                loss = forward(data()).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[-1].append(loss.detach())
    for got, expected in zip(*losses, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_low_rank_part_is_the_compilers():
    model, graphs = make_model(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    with flatkern.WeightNoise(model, 0.4).window():
        compiled(data())
    op = torch.ops.flatkern.noisy_linear
    (nodes,) = [[n for n in graph.graph.nodes if n.target in (op, op.default)] for graph in graphs]
    assert len(nodes) == sum(isinstance(m, flatkern.nn.LoRALinear) for m in model.modules())
    for node in nodes:
        assert node.args[3:5] == (None, None)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_noiseless_window_is_plain_lora_compiled_too(autocast):
    model = make_model(targets=TWO)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    noise = flatkern.WeightNoise(model, 0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(model, model, data())
        with noise.window():
            got = step(compiled, model, data())
    for mine, plain in zip(got, expected, strict=True):
        tolerances.assert_same_bits(mine, plain)


@both_modes
def test_compiled_backward_after_close_raises(mode):
    model = make_model(targets=TWO)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with flatkern.WeightNoise(model, 0.4, mode=mode).window():
        loss = compiled(data()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
