"""The product with a quantised base in a window: that with W + c z, W dequantised."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from quantized_bases import BNB, FORMATS, FP8, TORCHAO, dense, quantize
from quantized_models import (
    EVERY_FORMAT,
    NAMES,
    ONE_OF_EACH,
    SEED,
    SIGMA,
    assert_close,
    batch,
    delta_of,
    expected,
    found,
    layers,
    noisy,
    two,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import flatkern
from flatkern._memory import peak_bytes
from flatkern.integrations import quantized
from flatkern.integrations.peft import attach


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
