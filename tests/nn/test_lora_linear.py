"""LoRALinear against PEFT's LoRA layer, bit for bit on the same values, and its own contract."""

import copy
import math
import pickle

import pytest
import tolerances
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from flatkern.nn import LoRALinear, replace_linear

OPTIONS = [
    {},
    {"use_rslora": True},
    {"lora_dropout": 0.4},
    {"r": 1, "lora_alpha": 0.5},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randomise_adapters(layer):
    with torch.no_grad():
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=0.3)


def make_pair(dtype=torch.float32, bias=True, **options):
    """A LoRALinear and PEFT's layer around equal weights, with equal adapters."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 12, **options}
    linear = nn.Linear(24, 17, bias=bias, dtype=dtype)
    layer = LoRALinear.from_linear(copy.deepcopy(linear), **options)
    randomise_adapters(layer)
    config = LoraConfig(target_modules=["0"], **options)
    theirs = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return layer, theirs


def run(module, x, adapters, **autocast):
    """Output, and the gradients of the input and the adapters."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **autocast):
        y = module(x)
    y.square().sum().backward()
    return [y, x.grad, *(weight.grad for weight in adapters)]


def assert_equals_peft(layer, theirs, x, **autocast):
    got = run(layer, x, [layer.lora_A, layer.lora_B], **autocast)
    pair = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    for mine, expected in zip(got, run(theirs, x, pair, **autocast), strict=True):
        tolerances.assert_same_bits(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_peft(dtype, options):
    layer, theirs = make_pair(dtype, **options)
    assert layer.lora_A.dtype == theirs.lora_A["default"].weight.dtype
    assert_equals_peft(layer, theirs, torch.randn(2, 5, 24, dtype=dtype), enabled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_peft_under_autocast(dtype, options):
    layer, theirs = make_pair(dtype, **options)
    assert_equals_peft(layer, theirs, torch.randn(2, 5, 24), dtype=torch.bfloat16)


def test_equals_peft_without_bias_and_in_eval():
    layer, theirs = make_pair(bias=False, lora_dropout=0.4)
    assert layer.bias is None
    assert_equals_peft(layer.eval(), theirs.eval(), torch.randn(24), enabled=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_equals_peft_and_unmerge_is_exact(dtype):
    layer, theirs = make_pair(dtype)
    clean = layer.weight.detach().clone()
    exact = clean.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    # A dot product of length r, times s, plus W, then one rounding to the weight's dtype.
    size = clean.double().abs() + layer.scaling * layer.lora_B.abs() @ layer.lora_A.abs()
    wide = torch.promote_types(dtype, torch.float32)
    bound = (layer.r + 2) * tolerances.ulp(size, wide) + tolerances.ulp(exact, dtype) / 2
    theirs.merge()
    for _ in range(20):
        layer.merge()
        tolerances.assert_same_bits(layer.weight, theirs.base_layer.weight)
        tolerances.assert_same_bits(layer.weight, layer.merged_weight())
        tolerances.assert_within(layer.weight, exact, bound)
        layer.unmerge()
        tolerances.assert_same_bits(layer.weight, clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tolerances.assert_same_bits(layer.merged_weight(), theirs.base_layer.weight)


def test_merged_forward_uses_the_weight_alone():
    layer, _ = make_pair(lora_dropout=0.5)
    x = torch.randn(3, 24)
    expected = F.linear(x, layer.merged_weight(), layer.bias)
    torch.testing.assert_close(expected, layer.eval()(x))
    layer.train().merge()
    tolerances.assert_same_bits(layer(x), expected)


def test_merge_and_unmerge_twice():
    layer, _ = make_pair()
    clean = layer.weight.detach().clone()
    layer.unmerge()
    layer.merge()
    merged = layer.weight.detach().clone()
    layer.merge()
    tolerances.assert_same_bits(layer.weight, merged)
    assert layer.merged
    layer.unmerge()
    layer.unmerge()
    tolerances.assert_same_bits(layer.weight, clean)
    assert not layer.merged


def test_backward_after_merge_raises():
    layer, _ = make_pair()
    y = layer(torch.randn(3, 24, requires_grad=True))
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_state_dict_of_a_merged_layer_is_the_unmerged_one():
    layer, _ = make_pair()
    expected = copy.deepcopy(layer.state_dict())
    assert list(expected) == ["weight", "bias", "lora_A", "lora_B"]
    layer.merge()
    saved = nn.Sequential(layer).state_dict()
    assert list(saved) == [f"0.{name}" for name in expected]
    for name, value in expected.items():
        tolerances.assert_same_bits(saved[f"0.{name}"], value)
    merged = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(expected)
    tolerances.assert_same_bits(layer.weight, merged)
    layer.unmerge()
    layer.load_state_dict(expected)


def test_a_merged_layer_may_be_cast_and_copied():
    layer, _ = make_pair()
    clean = layer.weight.detach().clone()
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double()):
        other.unmerge()
        tolerances.assert_same_bits(other.weight.float(), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_initialisation(dtype):
    torch.manual_seed(0)
    sizes = {"in_features": 400, "out_features": 300, "r": 16, "dtype": dtype}
    linear_bound = 1 / math.sqrt(400)
    layers = {init: LoRALinear(**sizes, init_lora_weights=init) for init in (True, False)}
    for layer in layers.values():
        # Uniform on [-bound, bound]: nn.Linear's own initialisation.
        assert 0.99 * linear_bound < layer.lora_A.abs().max() <= linear_bound
        assert abs(layer.lora_A.std() * math.sqrt(3) / linear_bound - 1) < 0.05
    assert not layers[True].lora_B.any()
    assert 0.99 / 4 < layers[False].lora_B.abs().max() <= 1 / 4
    gaussian = LoRALinear(**sizes, init_lora_weights="gaussian")
    assert abs(gaussian.lora_A.std() * 16 - 1) < 0.05
    assert gaussian.lora_A.abs().max() > 3 / 16
    assert not gaussian.lora_B.any()
    assert gaussian.weight.dtype == dtype
    assert gaussian.lora_A.dtype == gaussian.lora_B.dtype == torch.float32


def test_constructor():
    layer = LoRALinear(6, 5, r=3, lora_alpha=9, use_rslora=True, bias=False, dtype=torch.float64)
    assert layer.weight.shape == (5, 6)
    assert layer.lora_A.shape == (3, 6)
    assert layer.lora_B.shape == (5, 3)
    assert layer.lora_A.dtype == torch.float64
    assert layer.bias is None
    assert layer.scaling == 9 / math.sqrt(3)
    assert LoRALinear(6, 5).scaling == 2.0
    trainable = [name for name, weight in layer.named_parameters() if weight.requires_grad]
    assert trainable == ["lora_A", "lora_B"]
    text = repr(layer)
    for part in ("in_features=6", "out_features=5", "r=3", "lora_alpha=9", "bias=False"):
        assert part in text


def test_from_linear_shares_the_parameters_and_freezes_them():
    linear = nn.Linear(6, 5).eval()
    layer = LoRALinear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    x = torch.randn(2, 6)
    tolerances.assert_same_bits(layer(x), linear(x))


def test_from_linear_takes_a_subclass_that_computes_the_same():
    class Named(nn.Linear):
        pass

    assert LoRALinear.from_linear(Named(3, 2)).in_features == 3


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched():
    linear = nn.Linear(3, 2)
    linear.forward = lambda x: x
    return linear


def hooked():
    linear = nn.Linear(3, 2)
    linear.register_forward_hook(lambda *_: None)
    return linear


WRONG_LINEAR = [
    (lambda: nn.Conv1d(3, 2, 1), TypeError, "Conv1d"),
    (lambda: nn.Bilinear(3, 2, 1), TypeError, "Bilinear"),
    (lambda: Doubling(3, 2), TypeError, "forward of its own"),
    (patched, TypeError, "forward of its own"),
    (lambda: nn.MultiheadAttention(4, 2).out_proj, TypeError, "MultiheadAttention"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), TypeError, "parametrized"),
    (lambda: LoRALinear(3, 2), TypeError, "LoRALinear"),
    (lambda: torch.ones(3), TypeError, "Tensor"),
    (hooked, ValueError, "hooks"),
    (lambda: nn.Linear(3, 2, dtype=torch.complex64), ValueError, "complex64"),
]


@pytest.mark.parametrize(("make", "error", "text"), WRONG_LINEAR)
def test_from_linear_refuses(make, error, text):
    linear = make()
    with pytest.raises(error, match=text):
        LoRALinear.from_linear(linear)
    if isinstance(linear, nn.Linear):
        assert linear.weight.requires_grad


WRONG_OPTION = [
    ({"r": 0}, ValueError),
    ({"r": -1}, ValueError),
    ({"r": 2.0}, TypeError),
    ({"r": True}, TypeError),
    ({"lora_alpha": 0}, ValueError),
    ({"lora_alpha": -1.0}, ValueError),
    ({"lora_alpha": math.nan}, ValueError),
    ({"lora_alpha": math.inf}, ValueError),
    ({"lora_alpha": "16"}, TypeError),
    ({"lora_dropout": 1.0}, ValueError),
    ({"lora_dropout": -0.1}, ValueError),
    ({"lora_dropout": math.nan}, ValueError),
    ({"use_rslora": 1}, TypeError),
    ({"init_lora_weights": "olora"}, ValueError),
    ({"init_lora_weights": None}, ValueError),
]


@pytest.mark.parametrize(("option", "error"), WRONG_OPTION, ids=str)
def test_options_are_checked(option, error):
    (name,) = option
    linear = nn.Linear(3, 2)
    with pytest.raises(error, match=name):
        LoRALinear.from_linear(linear, **option)
    with pytest.raises(error, match=name):
        LoRALinear(3, 2, **option)
    with pytest.raises(error, match=name):
        replace_linear(nn.Sequential(linear), "all-linear", **option)
    assert linear.weight.requires_grad


@pytest.mark.parametrize(("sizes", "error"), [((0, 2), ValueError), ((3, 2.0), TypeError)])
def test_sizes_are_checked(sizes, error):
    with pytest.raises(error, match="features"):
        LoRALinear(*sizes)


@pytest.mark.parametrize("padding", [False, True])
def test_torch_encoder_calls_the_layers_in_eval_mode(padding):
    # Its fast path reads weights past the layers, also while gradients are on: all are frozen.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    assert len(replace_linear(encoder, "all-linear", r=2)) == 4
    for module in encoder.modules():
        if isinstance(module, LoRALinear):
            randomise_adapters(module)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = padding
    expected = encoder.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        got = encoder.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got[~mask], expected[~mask])
    torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[~mask], expected[~mask])
