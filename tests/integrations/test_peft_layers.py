"""PEFT's layers over other bases than nn.Linear: noise of W', the same in both modes."""

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import layer_kinds
from layer_kinds import adapted, dense, inputs, peft_layers
from peft import LoraConfig, get_peft_model
from tiny import bits, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatkern import NoiseKey, ops
from flatkern.integrations.peft import attach, detach
from flatkern.nn import shown

KINDS = {kind: row for kind, row in layer_kinds.KINDS.items() if kind != "groups"}
# PEFT has DoRA for these.
DORA = ["Conv1D", "embedding", "scaled embedding", "conv1d", "conv2d", "conv3d", "pixels"]
CASES = [(kind, {}) for kind in KINDS] + [(kind, {"use_dora": True}) for kind in DORA]
every_case = pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{kind}-{'dora' if o else 'lora'}" for kind, o in CASES]
)
SIGMA = 0.3
MODES = ("virtual", "inplace")


def run(model, x, of=None):
    """The output, and the gradients of a forward and backward."""
    result, model = model(*x), of or model
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result.detach(), gradients


@pytest.mark.parametrize("mode", MODES)
@every_case
def test_a_window_shows_dense_noise_of_the_merged_weight(kind, options, mode):
    model, plain = adapted(kind, **options)
    before = bits(model)
    noise = attach(model, SIGMA, seed=3, mode=mode)
    twin, _ = adapted(kind, **options)
    expected = dense(kind, twin, plain, SIGMA, (3, 0, 0))
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    (expected * weights).sum().backward()
    expected_gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    with noise.window():
        result, gradients = run(model, inputs(kind))
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        if kind == "attention" and "out_proj" in name:
            # PEFT adds this adapter twice and backpropagates through one of them.
            gradient = 2 * gradient
        if kind == "embedding" and "embedding_A" in name:
            # PEFT drops the padding token's.
            expected_gradients[name][:, 0] = 0
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_modes_agree_and_no_noise_is_peft(kind, options, dtype):
    model, _ = adapted(kind, dtype, **options)
    x = inputs(kind, dtype)
    clean = run(model, x)
    found = {}
    for mode in MODES:
        noise = attach(model, SIGMA, mode=mode)
        with noise.window():
            found[mode] = run(model, x)
        assert not torch.equal(found[mode][0], clean[0])
        detach(model)
        with attach(model, 0.0, mode=mode).window():
            silent = run(model, x)
        detach(model)
        if options:
            # ||V|| of a window is made in float32, PEFT's in the weight's dtype.
            error = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(silent, clean, rtol=error, atol=4 * error)
            continue
        assert torch.equal(silent[0], clean[0])
        assert same_bits(silent[1], clean[1])
    assert torch.equal(found["virtual"][0], found["inplace"][0])
    assert same_bits(found["virtual"][1], found["inplace"][1])


def kept_by_autograd(model, x):
    """Of all that a forward keeps for backward but parameters, the elements in memory."""
    sizes = []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(*x)
    result.sum().backward()
    model.zero_grad()
    return sizes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_nothing_of_the_weights_size_is_kept(kind):
    # PEFT by itself keeps W + s B A of experts.
    model, _ = adapted(kind)
    x, *rest = inputs(kind)
    x = x.requires_grad_() if x.is_floating_point() else x
    layer = peft_layers(model)[0].get_base_layer()
    smallest = min(layer._parameters[name].numel() for name in KINDS[kind][1])
    without_noise = kept_by_autograd(model, (x, *rest))
    model, _ = adapted(kind)
    with attach(model, SIGMA).window():
        kept = kept_by_autograd(model, (x, *rest))
    assert smallest not in kept
    if "experts" in kind:
        # All else is kept where it was: hooks of checkpointing and offloading are asked for it.
        merged = {layer._parameters[name].numel() for name in KINDS[kind][1]}
        assert sorted(kept) == sorted(size for size in without_noise if size not in merged)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embedding" not in kind])
def test_backward_after_the_window_raises(kind):
    """Where it needs the weight: an embedding's adapters do not."""
    model, _ = adapted(kind)
    noise = attach(model, SIGMA)
    x, *rest = inputs(kind)
    with noise.window():
        result = model(x.requires_grad_(), *rest).sum()
    with pytest.raises(RuntimeError, match=r"after (the noise|its) window"):
        result.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind):
    model, _ = adapted(kind)
    noise = attach(model, SIGMA)
    x = inputs(kind)
    with noise.window(step=0):
        plain = run(model, x)
    with noise.window(step=0):
        again = run(lambda *x: checkpoint(model, *x, use_reentrant=False), x, model)
    assert torch.equal(again[0], plain[0])
    assert same_bits(again[1], plain[1])


def test_only_what_is_read_gets_noise(monkeypatch):
    made = []
    real = ops.foreach_perturb_

    def counting(weights, *args, row_offsets, **kwargs):
        made.extend(zip(row_offsets, (len(w) for w in weights), strict=True))
        real(weights, *args, row_offsets=row_offsets, **kwargs)

    model, _ = adapted("embedding")
    with attach(model, SIGMA).window():
        monkeypatch.setattr(shown.ops, "foreach_perturb_", counting)
        model(*inputs("embedding"))
    assert sorted(made) == [(row, 1) for row in (0, 2, 3, 5, 9)]
    model, _ = adapted("experts")
    made.clear()
    with attach(model, SIGMA).window():
        made.clear()
        result = model(*inputs("experts")).sum()
        # Experts 0, 1 and 3 of each stack: neighbours in one piece.
        assert sorted(made) == [(0, 16), (0, 20), (24, 8), (30, 10)]
        made.clear()
        result.backward()
        assert sum(rows for _, rows in made) <= 3 * 18


@pytest.mark.parametrize("mode", MODES)
@every_case
def test_what_peft_does_sees_clean_weights(kind, options, mode):
    model, plain = adapted(kind, **options)
    x, keys = inputs(kind), sorted(model.state_dict())
    # First: PEFT's own forward of an attention changes the weights by what rounding leaves.
    noise = attach(model, SIGMA, mode=mode)
    assert sorted(model.state_dict()) == keys
    before, clean = bits(model), model(*x)
    with model.disable_adapter():
        clean_base = model(*x)
    torch.testing.assert_close(clean_base, plain(*x))
    with noise.window():
        noisy = model(*x)
        with model.disable_adapter():
            assert torch.equal(model(*x), clean_base)
        with pytest.raises(RuntimeError, match="inside a noise window"):
            model.merge_adapter()
        saved = model.state_dict()
        assert all(torch.equal(saved[name], before[name]) for name in before)
        with noise.paused():
            assert torch.equal(model(*x), clean)
            model.merge_adapter()
            if kind != "attention":  # there PEFT's merge and its forward differ
                torch.testing.assert_close(model(*x), clean, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
        assert torch.equal(model(*x), noisy)
    assert same_bits(bits(model), before)
    # The order in which noise is numbered.
    assert list(bits(model)) == list(before)
    detach(model)
    assert torch.equal(model(*x), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_and_copies(kind):
    model, _ = adapted(kind)
    x = inputs(kind)
    clean = model(*x)
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    noise = attach(model, SIGMA)
    with noise.window():
        noisy = model(*x)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in twins:
            assert torch.equal(twin(*x), clean)
    detach(model)
    assert {n: sorted(module.__dict__) for n, module in model.named_modules()} == attributes
    for twin in twins:
        detach(twin)
        with attach(twin, SIGMA).window():
            assert torch.equal(twin(*x), noisy)


@pytest.mark.parametrize("strategy", ["gaussian", "matrix", "element", "row"])
@pytest.mark.parametrize("kind", ["Conv1D", "conv2d", "silent experts", "embedding"])
def test_strategies(kind, strategy):
    """c from the definition; z from a window of strategy "gaussian", which needs no weight."""
    _, names, _, by_row = KINDS[kind]
    model, _ = adapted(kind)
    layer = peft_layers(model)[0]
    name = getattr(layer, "parameter_name", names[0])
    weight = getattr(layer.get_base_layer(), name)
    clean = weight.detach().clone()
    merged = by_row(clean + layer.get_delta_weight("default").detach()).double()
    unit = attach(model, 1.0, strategy="gaussian", mode="inplace")
    with unit.window():
        z = by_row(weight.detach().double() - clean.double())
    detach(model)
    with attach(model, SIGMA, strategy=strategy, mode="inplace").window():
        e = by_row(weight.detach().double() - clean.double())
    c = {
        "gaussian": torch.full((len(merged), 1), SIGMA),
        "matrix": SIGMA * merged.norm(),
        "element": SIGMA * by_row(clean).abs(),
        "row": SIGMA * merged.norm(dim=1, keepdim=True),
    }[strategy]
    # z is rounded to float32 beside the weight: about 2^-22 of the largest.
    torch.testing.assert_close(e, c * z, rtol=1e-4, atol=1e-4)
    if kind == "embedding":
        assert not e[0].any()


REASONS = {
    "a convolution in groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "a convolution with dilation": lambda: nn.Conv1d(4, 4, 3, dilation=2),
    "max_norm": lambda: nn.Embedding(5, 4, max_norm=1.0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_takes_no_noise_is_named_once(reason):
    base = nn.Sequential(REASONS[reason](), nn.Linear(4, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
        noise = attach(model, SIGMA)
    own = [str(each.message) for each in caught if "no noise" in str(each.message)]
    assert len(own) == 1
    assert reason in own[0]
    assert "base_model.model.0" in own[0]
    assert len(noise.names) == 1
    assert noise.names[0].endswith("1.base_layer.weight")


def test_compiled_layers_and_torch_func():
    for kind in ("Conv1D", "conv2d"):
        model, _ = adapted(kind)
        x = inputs(kind)
        noise = attach(model, SIGMA)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with noise.window(step=0):
            expected = run(model, x)
        with noise.window(step=0):
            found = run(compiled, x, model)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(own, model=model, x=x):
            result = torch.func.functional_call(model, own, tuple(x))
            weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
            return (result * weights).sum()

        with noise.window(step=0):
            torch.testing.assert_close(torch.func.grad(loss)(parameters), expected[1])


def test_second_derivatives():
    model, _ = adapted("Conv1D", torch.float64)
    x = inputs("Conv1D", torch.float64)[0][:1].requires_grad_()
    with attach(model, SIGMA).window():
        assert torch.autograd.gradcheck(lambda x: torch.tanh(model(x)), x)
        assert torch.autograd.gradgradcheck(lambda x: torch.tanh(model(x)).sum(), x)


def test_a_key_says_the_noise_of_a_stack():
    """An element's coordinates are (expert and row, column) of the stack as it lies."""
    model, plain = adapted("experts")
    noise = attach(model, SIGMA, strategy="gaussian", mode="inplace", seed=5)
    with noise.window():
        noisy = peft_layers(model)[0].get_base_layer().gate_up_proj.detach().clone()
    z = ops.noise(40, 8, NoiseKey(seed=5, tensor=0).to("cpu")).view(4, 10, 8)
    expected = plain.layer.gate_up_proj + SIGMA * z
    torch.testing.assert_close(noisy, expected.detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["Conv1D", "conv1d", "conv2d", "conv3d"])
def test_dora_with_dropout(kind, mode):
    """Another input for all but W: x W^T + x' (d V - W)^T, with the clean ||V|| in d."""
    model, plain = adapted(kind, use_dora=True, lora_dropout=0.5)
    layer, by_row = peft_layers(model)[0], KINDS[kind][3]
    (x,) = inputs(kind)
    weight, bias = plain.double().layer.weight.detach(), plain.layer.bias.detach()
    delta = by_row(layer.get_delta_weight("default").detach().double())
    rows, mu = by_row(weight), layer.lora_magnitude_vector["default"].weight.detach().double()
    norms = (rows + delta).norm(dim=1)
    z = ops.noise(*weight.flatten(1).shape, NoiseKey(seed=3, tensor=0).to("cpu")).double()
    c = SIGMA / rows.shape[1] ** 0.5 * norms[:, None]
    noisy = rows + c * by_row(z.view(weight.shape))
    d = mu.view(-1, 1) / norms[:, None]

    def product(x, rows, bias):
        own = {"layer.weight": layer_kinds.by_row_back(rows, weight, by_row), "layer.bias": bias}
        return torch.func.functional_call(plain, own, x.double())

    with attach(model, SIGMA, seed=3, mode=mode).window():
        torch.manual_seed(5)
        result = model(x)
    torch.manual_seed(5)
    dropped = layer.lora_dropout["default"](x)
    expected = product(x, noisy, bias)
    expected = expected + product(dropped, (d - 1) * noisy + d * delta, torch.zeros_like(bias))
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DORA)
def test_dora_starts_as_lora(kind):
    """mu = ||V||, so W' and its noise are those of LoRA with these A and B."""
    model, _ = adapted(kind, use_dora=True)
    twin, _ = adapted(kind)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in own:
                value.copy_(own[name])
        for layer in peft_layers(model):
            dora = layer.lora_magnitude_vector["default"]
            delta, weight = layer.get_delta_weight("default"), layer.get_base_layer().weight
            delta = delta.t() if dora.fan_in_fan_out else delta
            dora.weight.copy_(dora.get_weight_norm(weight, delta, scaling=1))
    x = inputs(kind)
    for mode in MODES:
        with attach(model, SIGMA, mode=mode).window(), attach(twin, SIGMA, mode=mode).window():
            torch.testing.assert_close(model(*x), twin(*x), rtol=1e-4, atol=1e-4)
        detach(model)
        detach(twin)
