"""Noise on quantised bases: the product with what is stored, dequantised, and nothing written."""

import copy
import math

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from quantized_bases import BNB, FORMATS, FP8, TORCHAO, dense, quantize, storages
from tiny import fill
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import flatkern
from flatkern._memory import peak_bytes
from flatkern.integrations import quantized
from flatkern.integrations.peft import attach, detach

SIGMA = 0.3
SEED = 3
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)
NAMES = ("first", "second")
# One of each library, where what is tested does not depend on the format.
ONE_OF_EACH = pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4-nested", "bnb-int8"])


class Two(nn.Module):
    """Linear, tanh, linear; sizes that every format takes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128, dtype=dtype)
        self.second = nn.Linear(128, 32, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def two(form, config=None, dtype=torch.float32, **options):
    config = config or LoraConfig(r=4, lora_alpha=6, target_modules=list(NAMES), **options)
    model = get_peft_model(quantize(Two(dtype), form, NAMES), config)
    fill(model)
    return model


def layers(model):
    base = model.base_model.model
    return base.first, base.second


def batch(dtype=torch.float32, rows=5):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(9)).to(dtype)


def noisy(noise, name, weight, delta):
    """W + c z by the definition, in float64, from a dequantised weight."""
    line = next(line for line in noise.summary().splitlines() if line.startswith(name))
    number = int(line.split("tensor ")[1].split()[0])
    rows, cols = weight.shape
    c = SIGMA / math.sqrt(cols) * (weight + delta).norm(dim=1)
    key = flatkern.NoiseKey(seed=SEED, step=0, tensor=number).to("cpu")
    return weight + c[:, None] * flatkern.ops.noise(rows, cols, key).double()


def delta_of(layer):
    lora_A, lora_B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
    return layer.scaling["default"] * lora_B.detach().double() @ lora_A.detach().double()


def expected(layer, weight, x):
    """A LoRA layer's product over a weight in float64, and the gradients of the sum of its squares.

    Returns y, dX, dA, dB.
    """
    adapters = [getattr(layer, f"lora_{part}")["default"].weight for part in "AB"]
    x, lora_A, lora_B = (t.detach().double().requires_grad_() for t in (x, *adapters))
    bias = layer.base_layer.bias
    y = F.linear(x, weight, None if bias is None else bias.double())
    y = y + layer.scaling["default"] * x @ lora_A.t() @ lora_B.t()
    y.square().sum().backward()
    return y.detach(), x.grad, lora_A.grad, lora_B.grad


def found(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = [getattr(layer, f"lora_{part}")["default"].weight.grad for part in "AB"]
    return y.detach(), x.grad, *grads


def assert_close(results, references, tolerance):
    """Up to `tolerance` of the largest element."""
    for result, reference in zip(results, references, strict=True):
        atol = tolerance * reference.abs().max().item()
        torch.testing.assert_close(result.double(), reference, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*FORMATS, FP8])
def test_a_window_is_the_materialised_product(form, dtype):
    model = two(form, dtype=dtype)
    noise = attach(model, SIGMA, seed=SEED)
    assert len(noise.names) == 2
    for layer, name, width in zip(layers(model), noise.names, (64, 128), strict=True):
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(9)).to(dtype)
        reference = noisy(noise, name, dense(layer.base_layer), delta_of(layer))
        with noise.window(step=0):
            results = found(layer, x)
        assert results[0].dtype == results[1].dtype == dtype
        # Sums of 128 products in float32; in bfloat16 x, W_noisy (FP8Linear: its scales too), the
        # adapters' branch and the results are rounded to 2^-9 each.
        tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
        assert_close(results, expected(layer, reference, x), tolerance)


@EVERY_FORMAT
def test_without_noise_a_window_is_the_layer_itself(form):
    model = two(form)
    clean = model(batch())
    noise = attach(model, 0.0)
    with noise.window():
        result = model(batch())
    # Dequantised before the product rather than after it, where the library does the latter.
    torch.testing.assert_close(result, clean, rtol=1e-5, atol=1e-5)


@EVERY_FORMAT
def test_the_base_is_as_it_was(form):
    model = two(form)
    with model.disable_adapter():
        clean_base = model(batch())
    clean, keys, before = model(batch()), list(model.state_dict()), storages(model)
    noise = attach(model, SIGMA)
    assert list(model.state_dict()) == keys
    for _ in range(3):
        with noise.window():
            result = model(batch())
            result.sum().backward()
            assert not torch.allclose(result, clean, atol=1e-2)
            with noise.paused():
                assert torch.equal(model(batch()), clean)
            with model.disable_adapter():
                assert torch.equal(model(batch()), clean_base)
        assert torch.equal(model(batch()), clean)
    after = storages(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.state_dict()) == keys
    detach(model)
    assert torch.equal(model(batch()), clean)
    assert not any("_flatkern_site" in module.__dict__ for module in model.modules())


@EVERY_FORMAT
def test_an_evaluation_leaves_the_base_as_it_was(form):
    # bitsandbytes repacks 4-bit weights for inference on CPUs with AVX512-BF16, and loses bits.
    model = two(form)
    flags = [
        getattr(layer.base_layer, "support_avx512bf16_for_cpu", None) for layer in layers(model)
    ]
    before = storages(model)
    noise = attach(model, SIGMA)
    model.eval()
    with torch.no_grad():
        model(batch())
    after = storages(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.train()
    with noise.window():
        model(batch()).sum().backward()
    detach(model)
    assert flags == [
        getattr(layer.base_layer, "support_avx512bf16_for_cpu", None) for layer in layers(model)
    ]


@pytest.mark.parametrize("form", BNB[:1] + TORCHAO[:1])
def test_numbers_are_those_of_the_model_before_it_was_quantised(form):
    config = LoraConfig(r=4, target_modules=list(NAMES))
    plain = attach(get_peft_model(Two(), config)).summary().splitlines()
    lines = attach(two(form)).summary().splitlines()
    assert [line.split("tensor ")[1] for line in lines[:2]] == [
        line.split("tensor ")[1] for line in plain[:2]
    ]
    assert lines[2] == plain[2]  # elements and bytes: those of [m, n]
    assert lines[0].split()[1] == {"bnb-nf4": "nf4", "torchao-int8": "Int8Tensor"}[form]


@ONE_OF_EACH
def test_nothing_of_the_weight_s_size_is_saved(form):
    model = two(form)
    first, _ = layers(model)
    noise = attach(model, SIGMA)
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    x = batch().requires_grad_()
    with noise.window(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first.base_layer(x)
    # The row scale of 128 rows; the key is a row of a table of two.
    assert sorted(saved) == [64, 4 * 128]


@EVERY_FORMAT
def test_one_layer_at_a_time_has_elements(form):
    size, count = 512, 6
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))
    quantize(model, form, [str(number) for number in range(count)])
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    noise = attach(model, SIGMA)
    x = torch.randn(2, size)

    def run():
        model(x).sum().backward()

    noise.open()
    run()
    noise.close()
    elements = 4 * size * size
    # Of one layer the elements, and what the library needs to find them; or their noisy twins.
    assert peak_bytes(noise.open, "cpu") < 3.5 * elements
    assert peak_bytes(run, "cpu") < 3.5 * elements
    noise.close()


@pytest.mark.parametrize("form", TORCHAO)
def test_panels_are_the_whole(form, monkeypatch):
    model = quantize(nn.Sequential(nn.Linear(64, 300)), form, ["0"])
    monkeypatch.setattr(quantized, "_PANEL", 1)
    weight = quantized.stored(model[0])
    assert torch.equal(weight.dequantize(torch.float32), model[0].weight.dequantize())


def test_a_format_that_torchao_cannot_dequantise():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    class Opaque(Int8Tensor):
        dequantize = torch.Tensor.dequantize

    layer = quantize(nn.Sequential(nn.Linear(64, 64)), "torchao-int8", ["0"])[0]
    weight = layer.weight
    data = weight.qdata, weight.scale, weight.block_size, weight.dtype
    layer.weight = nn.Parameter(Opaque(*data), requires_grad=False)
    assert quantized.stored(layer).why_not() == "torchao's Opaque, which cannot be dequantised"


@ONE_OF_EACH
def test_a_late_backward_raises(form):
    model = two(form)
    noise = attach(model, SIGMA)
    with noise.window():
        loss = model(batch()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ONE_OF_EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_noise(form, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = two(form)
        x = batch().requires_grad_()
        with attach(model, SIGMA).window():
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            else:
                y = model(x)
            y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *gradients))


@ONE_OF_EACH
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_divides_by_the_clean_norm(form, dropout):
    model = two(form, use_dora=True, lora_dropout=dropout)
    first, _ = layers(model)
    with torch.no_grad():
        first.lora_magnitude_vector["default"].weight.mul_(1.3)
    noise = attach(model, SIGMA, seed=SEED)
    weight, delta = dense(first.base_layer), delta_of(first)
    shown = noisy(noise, noise.names[0], weight, delta)
    d = first.lora_magnitude_vector["default"].weight.detach().double()
    d = d / (weight + delta).norm(dim=1)
    x = batch()
    torch.manual_seed(5)
    dropped = first.lora_dropout["default"](x).double()
    with noise.window():
        torch.manual_seed(5)
        result = first(x)
    reference = F.linear(x.double(), shown, first.base_layer.bias.double())
    reference = reference + (d - 1) * F.linear(dropped, shown) + d * F.linear(dropped, delta)
    torch.testing.assert_close(result.detach().double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4", "bnb-int8"])
def test_adalora(form):
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=list(NAMES), lora_alpha=6
    )
    model = two(form, config)
    first, _ = layers(model)
    noise = attach(model, SIGMA, seed=SEED)
    delta = first.scaling["default"] / (first.ranknum["default"].item() + 1e-5)
    delta = delta * (first.lora_B["default"] @ (first.lora_A["default"] * first.lora_E["default"]))
    delta = delta.detach().double()
    shown = noisy(noise, noise.names[0], dense(first.base_layer), delta)
    with noise.window():
        result = first(batch())
        result.sum().backward()
    reference = F.linear(batch().double(), shown + delta, first.base_layer.bias.double())
    torch.testing.assert_close(result.detach().double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["gaussian", "matrix", "element", "row"])
def test_other_scales_are_of_the_dequantised_weight(strategy):
    model = two("bnb-nf4")
    first, _ = layers(model)
    noise = attach(model, SIGMA, seed=SEED, strategy=strategy)
    weight, delta = dense(first.base_layer), delta_of(first)
    merged = weight + delta
    c = {
        "gaussian": torch.ones(128, 1),
        "matrix": merged.norm().expand(128, 1),
        "element": weight.abs(),
        "row": merged.norm(dim=1, keepdim=True),
    }[strategy]
    key = flatkern.NoiseKey(seed=SEED, step=0, tensor=0).to("cpu")
    shown = weight + SIGMA * c.double() * flatkern.ops.noise(128, 64, key).double()
    with noise.window():
        results = found(first, batch())
    assert_close(results, expected(first, shown, batch()), 1e-5)


def test_a_scope_without_adapters_takes_the_weight_s_own_scale():
    model = two("torchao-int8")
    first, _ = layers(model)
    noise = attach(model, SIGMA, seed=SEED, scope="origin")
    assert [name.split(".")[2:] for name in noise.names] == [
        ["first", "base_layer", "weight"],
        ["first", "base_layer", "bias"],
        ["second", "base_layer", "weight"],
    ]
    weight = dense(first.base_layer)
    reference = noisy(noise, noise.names[0], weight, torch.zeros_like(weight))
    with noise.window():
        bias = first.base_layer.bias.detach().double()
        result = first.base_layer(batch())
    expected_result = F.linear(batch().double(), reference, bias)
    torch.testing.assert_close(result.double(), expected_result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4"])
def test_what_no_layer_shows_is_left_out(form):
    model = get_peft_model(quantize(Two(), form, NAMES), LoraConfig(r=4, target_modules=["first"]))
    noise = attach(model, SIGMA, scope="origin")
    assert not any("second" in name for name in noise.names)


@ONE_OF_EACH
def test_a_bias_that_is_trained_gets_its_gradient(form):
    model = two(form, bias="lora_only")
    first, _ = layers(model)
    noise = attach(model, SIGMA)
    with noise.window():
        y = first(batch().reshape(1, 5, 64))
        y.square().sum().backward()
    torch.testing.assert_close(first.base_layer.bias.grad, 2 * y.detach().sum((0, 1)))


@EVERY_FORMAT
def test_autocast(form):
    model = two(form)
    first, _ = layers(model)
    noise = attach(model, SIGMA, seed=SEED)
    first(batch())  # from here on Linear4bit computes in float32
    shown = noisy(noise, noise.names[0], dense(first.base_layer), delta_of(first))
    with noise.window(), torch.autocast("cpu", torch.bfloat16):
        results = found(first, batch())
        base_result = first.base_layer(batch())
    assert results[1].dtype == torch.float32
    four_bits = form in BNB and form != "bnb-int8"
    assert base_result.dtype == (torch.float32 if four_bits else torch.bfloat16)
    assert_close(results, expected(first, shown, batch()), 1.5e-2)


@pytest.mark.parametrize("form", ["bnb-nf4"])
def test_the_layer_s_own_compute_dtype(form):
    model = two(form)
    first, _ = layers(model)
    first.base_layer.compute_dtype, first.base_layer.compute_type_is_set = torch.bfloat16, True
    noise = attach(model, SIGMA, seed=SEED)
    shown = noisy(noise, noise.names[0], dense(first.base_layer), delta_of(first))
    with noise.window():
        results = found(first, batch())
    assert results[0].dtype == torch.float32
    references = expected(first, shown, batch())
    assert_close(results, references, 1.5e-2)
    with pytest.raises(AssertionError):  # as float32 would be
        assert_close(results, references, 1e-4)


@ONE_OF_EACH
def test_backends_agree(form):
    results = []
    for backend in ("auto", "reference"):
        model = two(form)
        noise = attach(model, SIGMA)
        with flatkern.backend(backend), noise.window():
            results.append(found(layers(model)[0], batch()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@ONE_OF_EACH
def test_inplace_is_refused_and_auto_is_virtual(form):
    model = two(form)
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError, match=r"mode must be 'virtual' or 'auto' .*quantised, as .*first"
    ):
        attach(model, SIGMA, mode="inplace")
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == before
    noise, stored = attach(model, SIGMA, mode="auto"), storages(model)
    with noise.window(micro_batches=100):
        during = storages(model)
    assert all(torch.equal(stored[name], during[name]) for name in stored)


@pytest.mark.parametrize("form", ["bnb-nf4", "bnb-int8"])
@pytest.mark.filterwarnings("ignore:.*rounding errors")
def test_merging(form):
    model = two(form)
    noise = attach(model, SIGMA)
    with noise.window():
        for act in (model.merge_adapter, model.unmerge_adapter):
            with pytest.raises(RuntimeError, match="inside a noise window"):
                act()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        noise.open()
    model.unmerge_adapter()
    # It was quantised again: the new values count.
    first, _ = layers(model)
    noise.load_state_dict({"seed": SEED, "step": 0})
    shown = noisy(noise, noise.names[0], dense(first.base_layer), delta_of(first))
    with noise.window():
        results = found(first, batch())
    assert_close(results, expected(first, shown, batch()), 1e-5)


@ONE_OF_EACH
def test_a_copy_is_attached_for_itself(form):
    model = two(form)
    model(batch())
    noise = attach(model, SIGMA)
    twin = copy.deepcopy(model)
    assert layers(twin)[0]._flatkern_site.quantized.base is layers(twin)[0].base_layer
    with noise.window():
        noisy_result = model(batch())
        assert not torch.equal(twin(batch()), noisy_result)


@ONE_OF_EACH
def test_compiled(form):
    model = two(form)
    noise = attach(model, SIGMA)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        gradients = []
        for forward in (model, compiled):
            model.zero_grad()
            with noise.window(step=step):
                forward(batch()).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    with noise.window():
        loss = compiled(batch()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    torch._dynamo.reset()


class Unknown(nn.Linear):
    pass


def test_what_cannot_take_noise_is_named():
    pytest.importorskip("torchao", reason="torchao is not installed")
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    quantize(model, "torchao-int8", ["0"])
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: name == "1")
    model[2] = bnb.nn.Linear4bit(64, 64)
    model[3].weight = nn.Parameter(to_nf4(model[3].weight.data, 64, 64), requires_grad=False)
    model[4] = Unknown(64, 64)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="no noise on") as warned:
        noise = attach(model, SIGMA)
    assert [name.split(".")[2] for name in noise.names] == ["0"]
    message = str(warned[0].message)
    for number, reason in enumerate(
        (
            "torchao's Int8Tensor with quantised activations",
            "bitsandbytes' Linear4bit that is not quantised yet",
            "base weight of type NF4Tensor",
            "base layer Unknown",
        ),
        1,
    ):
        assert f"{reason}: base_model.model.{number}" in message


@pytest.mark.parametrize("form", ["torchao-int8", "bnb-nf4"])
def test_flatkern_s_own_layers_refuse_it(form):
    model = quantize(Two(), form, NAMES)
    with pytest.raises((TypeError, ValueError), match=r"first.* (Int8Tensor|Linear4bit|uint8)"):
        flatkern.nn.replace_linear(model, target_modules=["first"])


def test_a_repacked_layer_is_named():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = two("bnb-nf4")
    first, _ = layers(model)
    first.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match="repacked for inference on CPU: .*first"):
        attach(model, SIGMA)
