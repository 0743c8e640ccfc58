"""attach and detach: noise of W' in PEFT's layers, and nothing else changed."""

import copy
import math
import pickle
import warnings

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import peft
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny import adapted, bits, fill, llama, same_bits, tokens
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import flatkern
from flatkern.integrations.peft import attach, detach
from flatkern.nn import DoRALinear, LoRALinear

SIGMA = 0.3
MODES = ("virtual", "inplace")
PROJECTIONS = ["q_proj", "v_proj"]


class Two(nn.Module):
    """Linear, tanh, linear."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 32, dtype=dtype)
        self.second = nn.Linear(32, 8, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def two(config=None, dtype=torch.float32, **options):
    config = config or LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **options)
    model = get_peft_model(Two(dtype), config)
    fill(model)
    return model


def batch(dtype=torch.float32):
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(9)).to(dtype)


def layers(model):
    base = model.base_model.model
    return base.first, base.second


def own_layer(layer, kind=LoRALinear):
    """flatkern's layer on the values of PEFT's."""
    rank = layer.r["default"]
    base = copy.deepcopy(layer.base_layer)
    base.__dict__.pop("forward", None)
    own = kind.from_linear(base, rank, layer.lora_alpha["default"])
    own.scaling = layer.scaling["default"]
    with torch.no_grad():
        own.lora_A.copy_(layer.lora_A["default"].weight)
        own.lora_B.copy_(layer.lora_B["default"].weight)
        if kind is DoRALinear:
            own.lora_magnitude.copy_(layer.lora_magnitude_vector["default"].weight)
    return own


def own_model(model, kind=LoRALinear):
    """flatkern's layers in the place of PEFT's, with the same tensor numbers."""
    twin = Two(next(model.parameters()).dtype)
    twin.first, twin.second = (own_layer(layer, kind) for layer in layers(model))
    return twin


def noisy_weight(noise, name, weight, lora_delta):
    """W + c z from the definition, in float64."""
    line = next(line for line in noise.summary().splitlines() if line.startswith(name))
    number = int(line.split("tensor ")[1].split()[0])
    rows, cols = weight.shape
    c = SIGMA / math.sqrt(cols) * (weight.double() + lora_delta.double()).norm(dim=1)
    key = flatkern.NoiseKey(seed=3, step=0, tensor=number).to("cpu")
    return weight.double() + c[:, None] * flatkern.ops.noise(rows, cols, key).double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_a_window_is_that_of_lora_linear(mode, dtype, options):
    model = two(dtype=dtype, **options)
    twin = own_model(model)
    noise = attach(model, SIGMA, seed=3, mode=mode)
    own = flatkern.WeightNoise(twin, SIGMA, seed=3, mode="inplace")
    x = batch(dtype)
    with noise.window(), own.window():
        result, expected = model(x), twin(x)
        result.square().sum().backward()
        expected.square().sum().backward()
    # The same noise to the bit; the virtual product may sum in another order.
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)
    for layer, twin_layer in zip(layers(model), (twin.first, twin.second), strict=True):
        for part in "AB":
            grad = getattr(layer, f"lora_{part}")["default"].weight.grad
            twin_grad = getattr(twin_layer, f"lora_{part}").grad
            torch.testing.assert_close(grad, twin_grad, rtol=5 * rtol, atol=5 * rtol)


def two_by_lora_ga():
    """LoRA-GA's start, from the gradients of a batch."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["first", "second"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    base = Two()
    before = base.first.weight.detach().clone()
    peft.preprocess_loraga(base, config, lambda: base(batch()).square().sum().backward())
    model = get_peft_model(base, config)
    # PEFT moves what the adapters start with out of the base.
    assert not torch.equal(layers(model)[0].base_layer.weight, before)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("init", ["pissa", "gaussian", "lora_ga"])
def test_starts_take_the_scale_of_the_whole_weight(mode, init):
    if init == "lora_ga" and not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this peft has no LoRA-GA")
    model = two_by_lora_ga() if init == "lora_ga" else two(init_lora_weights=init)
    noise = attach(model, SIGMA, seed=3, mode=mode)
    first, second = layers(model)
    deltas = [layer.get_delta_weight("default") for layer in (first, second)]
    names = noise.names
    weights = [layer.base_layer.weight.detach().clone() for layer in (first, second)]
    noisy = [noisy_weight(noise, n, w, d) for n, w, d in zip(names, weights, deltas, strict=True)]
    x = batch()
    with noise.window():
        result = model(x)
    inner = torch.tanh(F.linear(x.double(), noisy[0] + deltas[0].double(), first.bias.double()))
    expected = F.linear(inner, noisy[1] + deltas[1].double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_adalora_takes_its_masked_factors(mode):
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["first", "second"], lora_alpha=6
    )
    model = two(config)
    with torch.no_grad():
        layers(model)[0].lora_E["default"][1] = 0
    noise = attach(model, SIGMA, seed=3, mode=mode)
    first, second = layers(model)
    deltas = [layer.get_delta_weight("default").detach() for layer in (first, second)]
    weights = [layer.base_layer.weight.detach().clone() for layer in (first, second)]
    noisy = [
        noisy_weight(noise, n, w, d) for n, w, d in zip(noise.names, weights, deltas, strict=True)
    ]
    with noise.window():
        result = model(batch())
    inner = F.linear(batch().double(), noisy[0] + deltas[0], first.bias.double())
    expected = F.linear(torch.tanh(inner), noisy[1] + deltas[1].double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_divides_by_the_clean_norm(mode, dropout):
    model = two(use_dora=True, lora_dropout=dropout)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    noise = attach(model, SIGMA, seed=3, mode=mode)
    first, _ = layers(model)
    weight = first.base_layer.weight.detach().clone()
    delta = first.get_delta_weight("default").detach()
    noisy = noisy_weight(noise, noise.names[0], weight, delta)
    mu = first.lora_magnitude_vector["default"].weight.double()
    d = (mu / (weight.double() + delta).norm(dim=1)).detach()
    x = batch()
    torch.manual_seed(5)
    dropped = first.lora_dropout["default"](x).double()
    with noise.window():
        torch.manual_seed(5)
        result = first(x)
    expected = F.linear(x.double(), noisy, first.bias.double())
    expected = expected + (d - 1) * F.linear(dropped, noisy) + d * F.linear(dropped, delta.double())
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_dora_is_dora_linear():
    model = two(use_dora=True)
    twin = own_model(model, DoRALinear)
    noise = attach(model, SIGMA, seed=3)
    own = flatkern.WeightNoise(twin, SIGMA, seed=3)
    with noise.window(), own.window():
        torch.testing.assert_close(model(batch()), twin(batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_active_adapters_add_up(mode):
    model = two()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["first"]))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    noise = attach(model, SIGMA, seed=3, mode=mode)
    first, _ = layers(model)
    delta = sum(first.get_delta_weight(name) for name in ("default", "other")).detach()
    weight = first.base_layer.weight.detach().clone()
    noisy = noisy_weight(noise, noise.names[0], weight, delta) + delta
    with noise.window():
        result = first(batch())
    expected = F.linear(batch().double(), noisy, first.bias.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_what_peft_does_sees_clean_weights(mode, tmp_path):
    model = two()
    before, keys = bits(model), list(model.state_dict())
    with model.disable_adapter():
        clean_base = model(batch())
    clean = model(batch())
    noise = attach(model, SIGMA, mode=mode)
    assert list(model.state_dict()) == keys
    with noise.window():
        assert not torch.equal(model(batch()), clean)
        with model.disable_adapter():
            assert torch.equal(model(batch()), clean_base)
        model.save_pretrained(tmp_path)
        saved = model.state_dict()
        assert all(torch.equal(saved[name], before[name]) for name in before)
        for act in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match="inside a noise window"):
                act()
    assert same_bits(bits(model), before)
    assert torch.equal(model(batch()), clean)
    adapters = get_peft_model_state_dict(model)
    model.load_adapter(tmp_path, adapter_name="again")
    model.set_adapter("again")
    again = get_peft_model_state_dict(model, adapter_name="again")
    assert all(torch.equal(adapters[name], again[name]) for name in adapters)
    with noise.window():
        model(batch())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        noise.open()
    model.unmerge_adapter()
    with noise.window():
        model(batch())


def attributes(model):
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_detach_leaves_nothing(mode, dora):
    model = two(use_dora=dora)
    before = attributes(model), hooks(model), bits(model), model(batch())
    noise = attach(model, SIGMA, mode=mode)
    with pytest.raises(RuntimeError, match="attached already"):
        attach(model)
    with noise.window():
        model(batch()).sum().backward()
        with pytest.raises(RuntimeError, match="detach inside a noise window"):
            detach(model)
    detach(model)
    detach(model)
    assert attributes(model) == before[0]
    assert hooks(model) == before[1]
    assert same_bits(bits(model), before[2])
    assert torch.equal(model(batch()), before[3])
    with pytest.raises(RuntimeError, match="after detach"):
        noise.open()
    attach(model)


def test_detach_finds_what_peft_unloaded():
    model = two()
    attach(model)
    merged = model.merge_and_unload()
    detach(merged)
    assert "forward" not in merged.first.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_attached_for_itself(copied):
    model = two(use_dora=True)
    clean = model(batch())
    noise = attach(model, SIGMA)
    with noise.window():
        twin = copied(model)
        assert torch.equal(twin(batch()), clean)
    detach(twin)
    assert torch.equal(twin(batch()), clean)
    with attach(twin, SIGMA).window():
        assert not torch.equal(twin(batch()), clean)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.gpt2 = Conv1D(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.expert = Expert()
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        x = self.gpt2(self.conv(self.embed(ids)[None])[0])
        x, _ = self.attention(x, x, x)
        return self.head(self.expert(self.linear(x)))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.eye(16))

    def forward(self, x):
        return x @ self.table


def test_every_layer_takes_noise_and_saved_modules_are_left_alone():
    targets = ["embed", "conv", "gpt2", "attention", "linear"]
    config = LoraConfig(
        r=2, target_modules=targets, target_parameters=["expert.table"], modules_to_save=["head"]
    )
    with warnings.catch_warnings():
        # Of Conv1D's fan_in_fan_out.
        warnings.simplefilter("ignore")
        model = get_peft_model(Mixed(), config)
    noise = attach(model, SIGMA)
    own = [
        name.removeprefix("base_model.model.").replace("base_layer.", "") for name in noise.names
    ]
    weights = ["attention.in_proj_weight", "attention.out_proj.weight", "expert.table"]
    weights += [f"{name}.weight" for name in ("embed", "conv", "gpt2", "linear")]
    assert sorted(own) == sorted(weights)
    # Numbered as in the model without PEFT.
    numbers = {name: i for i, (name, _) in enumerate(Mixed().named_parameters())}
    for line, name in zip(noise.summary().splitlines(), own, strict=False):
        assert f"tensor {numbers[name]} " in line
    with noise.window():
        model(torch.arange(4)).sum().backward()
    detach(model)
    assert not any("_flatkern_site" in module.__dict__ for module in model.modules())


def base_bits(model):
    return bits(model, lambda name: "lora_" not in name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Another adapter of the same shape, on disk, and its values."""
    folder = tmp_path_factory.mktemp("adapter")
    other = two()
    fill(other, seed=8)
    other.save_pretrained(folder)
    return folder, get_peft_model_state_dict(other)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_come_and_go_over_clean_weights(mode, inside, dora, saved):
    folder, values = saved
    model = two(use_dora=dora)
    kind = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "use_dora": dora}
    model.add_adapter("other", LoraConfig(**kind))
    fill(model, seed=5)
    before = base_bits(model)
    clean = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        clean[name] = model(batch())
    noise = attach(model, SIGMA, seed=3, mode=mode)
    acts = [
        lambda: model.set_adapter("other"),
        lambda: hotswap_adapter(model, folder, "other") if not dora else None,
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("other"),
    ]
    for act in acts:
        if inside:
            with noise.window():
                model(batch())
                act()
                model(batch()).sum().backward()
                if act is acts[0]:
                    # What was not active at the open is as clean underneath.
                    with noise.paused():
                        assert torch.equal(model(batch()), clean["other"])
        else:
            act()
        assert same_bits(base_bits(model), {name: before[name] for name in base_bits(model)})
        with noise.window():
            assert not torch.equal(model(batch()), clean["default"])
        if act is acts[1] and not dora:
            found = get_peft_model_state_dict(model, adapter_name="other")
            assert all(torch.equal(found[name], values[name]) for name in values)
    assert torch.equal(model(batch()), clean["default"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_that_becomes_active_in_a_window_divides_by_the_clean_norm(mode, dropout):
    results = []
    for late in (False, True):
        model = two(use_dora=True, lora_dropout=dropout)
        kind = {"target_modules": ["first", "second"], "use_dora": True, "lora_dropout": dropout}
        model.add_adapter("other", LoraConfig(**kind))
        fill(model, seed=5)
        # Of equal scale whatever is active.
        noise = attach(model, SIGMA, strategy="gaussian", mode=mode)
        if not late:
            model.set_adapter("other")
        with noise.window():
            model.set_adapter("other")
            torch.manual_seed(5)
            results.append(layers(model)[0](batch()))
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [True, "pissa"])
def test_adapters_are_loaded_over_clean_weights_alone(mode, start, saved):
    folder, values = saved
    model = two()
    before = base_bits(model)
    noise = attach(model, SIGMA, mode=mode)
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=start)
    with noise.window():
        if mode == "inplace":
            # PiSSA's start decomposes the weight, and writes it.
            for act in (
                lambda: model.add_adapter("more", config),
                lambda: model.load_adapter(folder, "more"),
            ):
                with pytest.raises(RuntimeError, match="adding an adapter while in-place noise"):
                    act()
            assert list(model.peft_config) == ["default"]
            with noise.paused():
                model.load_adapter(folder, "more")
        else:
            model.load_adapter(folder, "more")
        model(batch())
    assert same_bits(base_bits(model), before)
    found = get_peft_model_state_dict(model, adapter_name="more")
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_a_scaling_that_is_a_tensor_counts():
    scales = []
    for prepared in (False, True):
        model = two()
        if prepared:
            prepare_model_for_compiled_hotswap(model)
        noise = attach(model, SIGMA)
        with noise.window():
            scales.append(noise._states[0].row_scale.clone())
    assert torch.equal(*scales)


def test_nothing_is_attached_where_nothing_can_be():
    with pytest.raises(ValueError, match="got no PEFT layers"):
        attach(nn.Linear(3, 3))
    groups = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(groups, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"none that can .*in groups"):
        attach(model)
    model = two()
    before = attributes(model)
    with pytest.raises(ValueError, match="sigma"):
        attach(model, -1.0)
    with pytest.raises(TypeError, match="model"):
        attach("model")
    assert attributes(model) == before


def test_a_part_that_does_not_know_its_place_is_skipped():
    """As older transformers leave what tensor parallelism has cut."""
    model = two()
    layers(model)[0].base_layer._hf_tp_plan = "colwise"
    with pytest.warns(UserWarning, match=r"part of a larger one, and no DTensor: .*first"):
        noise = attach(model)
    assert [name.split(".")[-3] for name in noise.names] == ["second"]


def test_dora_beside_another_adapter_is_refused():
    model = two(use_dora=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    noise = attach(model)
    with pytest.raises(RuntimeError, match="only a lone DoRA"):
        noise.open()


def test_a_fused_stack_is_named():
    model = adapted()
    model.base_model.model.model.layers[0].self_attn.apply_qkv = lambda *args: None
    with pytest.warns(UserWarning, match="self_attn .*without calling the layers"):
        attach(model)
    detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, mode="inplace")


def test_gradient_checkpointing_recomputes_the_same_noise():
    gradients = []
    for checkpointed in (False, True):
        model = adapted()
        noise = attach(model, SIGMA)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        with noise.window():
            model(**tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_autocast_and_modules_added_by_transformers():
    model = llama()
    try:
        model.add_adapter(LoraConfig(r=4, target_modules=PROJECTIONS))
    except ValueError as error:  # each release of transformers says which PEFT it takes
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    noise = attach(model, SIGMA)
    clean = model(**tokens()).loss
    with noise.window(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(**tokens()).loss, clean)
    assert torch.equal(model(**tokens()).loss, clean)


@pytest.mark.parametrize("mode", MODES)
def test_a_late_backward_raises(mode):
    model = two()
    noise = attach(model, SIGMA, mode=mode)
    # In place, where the input needs no gradient, autograd saves adapters alone, and no weight;
    # a virtual first layer alone would save nothing of the noise, and give the right gradients.
    seen = model if mode == "virtual" else layers(model)[0]
    with noise.window():
        loss = seen(batch()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
