"""DoRALinear against PEFT's DoRA layer on the same values, and its own contract."""

import copy
import pickle

import pytest
import tolerances
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatkern.nn import DoRALinear, LoRALinear, replace_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PARTS = ("lora_A", "lora_B", "lora_magnitude")


def make_pair(dtype=torch.float32, bias=True, **options):
    """A DoRALinear and PEFT's layer around equal weights, with equal, trained adapters."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 12, **options}
    linear = nn.Linear(24, 17, bias=bias, dtype=dtype)
    layer = DoRALinear.from_linear(copy.deepcopy(linear), **options)
    config = LoraConfig(target_modules=["0"], use_dora=True, **options)
    theirs = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    own = parameters_of(theirs)
    start = layer.lora_magnitude.detach().clone()
    # PEFT rounds its start to the weight's dtype.
    bound = 2e-6 + tolerances.ulp(start, dtype)
    tolerances.assert_within(start, own["lora_magnitude"], bound)
    with torch.no_grad():
        for name in PARTS:
            value = getattr(layer, name)
            value += 0.3 * torch.randn_like(value)
            own[name].copy_(value)
    return layer, theirs


def parameters_of(theirs):
    return {
        "lora_A": theirs.lora_A["default"].weight,
        "lora_B": theirs.lora_B["default"].weight,
        "lora_magnitude": theirs.lora_magnitude_vector["default"].weight,
    }


def run(module, x, own, autocast=False):
    """Output, and the gradients of the input and the adapters."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.float().square().sum().backward()
    return {"y": y, "x": x.grad} | {name: own[name].grad for name in PARTS}


def assert_close(got, expected, relative):
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        tolerances.assert_within(got[name], value, relative * value.double().abs().max())


# Both round at other places: a few roundings of the weight's dtype (norms in float32 at best).
RELATIVE = {
    torch.float64: 1e-6,
    torch.float32: 2e-6,
    torch.bfloat16: 6 * 2.0**-8,
    torch.float16: 6 * 2.0**-11,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=str)
def test_equals_peft(dtype, options, bias):
    layer, theirs = make_pair(dtype, bias, **options)
    own = {name: getattr(layer, name) for name in PARTS}
    x = torch.randn(2, 5, 24, dtype=dtype)
    expected = run(theirs, x, parameters_of(theirs))
    assert_close(run(layer, x, own), expected, RELATIVE[dtype])
    tolerances.assert_within(layer.eval()(x), theirs.eval()(x), 0.1)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}], ids=str)
def test_equals_peft_under_autocast(options):
    layer, theirs = make_pair(**options)
    own = {name: getattr(layer, name) for name in PARTS}
    x = torch.randn(2, 5, 24)
    got = run(layer, x, own, autocast=True)
    expected = run(theirs, x, parameters_of(theirs), autocast=True)
    if not options:
        # PEFT returns float32 here: it adds the float32 part after the product.
        assert got["y"].dtype == torch.bfloat16
    expected["y"] = expected["y"].to(got["y"].dtype)
    assert_close(got, expected, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_equals_peft_and_unmerge_is_exact(dtype):
    layer, theirs = make_pair(dtype)
    clean = layer.weight.detach().clone()
    theirs.merge()
    layer.merge()
    bound = 4e-6 + tolerances.ulp(theirs.base_layer.weight.detach(), dtype)
    tolerances.assert_within(layer.weight, theirs.base_layer.weight, bound)
    layer.unmerge()
    tolerances.assert_same_bits(layer.weight, clean)


@pytest.mark.parametrize("init", [True, "gaussian", False, "pissa"])
def test_starts_at_the_linear_layer(init):
    torch.manual_seed(0)
    linear = nn.Linear(24, 17)
    x = torch.randn(3, 24)
    expected = linear(x)
    layer = DoRALinear.from_linear(linear, r=4, init_lora_weights=init)
    if init is False:
        # W' has V's rows at their own length.
        expected = expected + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t()
    tolerances.assert_within(layer(x), expected, 2e-6)
    names = [name for name, value in layer.named_parameters() if value.requires_grad]
    assert names == list(PARTS)


def test_rows_of_zeros_stay_zero():
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = DoRALinear.from_linear(linear, r=2)
    y = layer(torch.randn(4, 6))
    tolerances.assert_same_bits(y[:, 1], linear.bias[1].expand(4))
    y.square().sum().backward()
    for name in PARTS:
        assert getattr(layer, name).grad.isfinite().all(), name


def test_replace_linear_and_state_dict():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    before = model(torch.ones(6))
    assert replace_linear(model, ["0"], r=2, layer=DoRALinear, renorm=True) == ["0"]
    assert type(model[0]) is DoRALinear
    assert model[0].renorm
    assert "renorm=True" in repr(model[0])
    torch.testing.assert_close(model(torch.ones(6)), before)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trainable == [f"0.{name}" for name in PARTS]
    other = DoRALinear(6, 5, 2)
    other.load_state_dict(model[0].state_dict())
    for twin in (other, copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        tolerances.assert_same_bits(twin(torch.ones(6)), model[0](torch.ones(6)))


def test_compiles_without_breaks():
    layer, _ = make_pair()
    x = torch.randn(2, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"renorm": 1}, TypeError, "renorm"),
        ({"r_inner": 2}, TypeError, "r_inner"),
        ({"r": 0}, ValueError, "r must be"),
    ],
)
def test_options_are_checked(options, error, text):
    linear = nn.Linear(6, 5)
    model = nn.Sequential(linear)
    for make in (
        lambda: DoRALinear.from_linear(linear, **options),
        lambda: DoRALinear(6, 5, **options),
        lambda: replace_linear(model, "all-linear", layer=DoRALinear, **options),
    ):
        with pytest.raises(error, match=text):
            make()
    assert model[0] is linear
    assert linear.weight.requires_grad


@pytest.mark.parametrize("layer", [nn.Linear, DoRALinear(3, 2), "dora"])
def test_replace_linear_needs_a_kind(layer):
    with pytest.raises(TypeError, match="layer must be LoRALinear"):
        replace_linear(nn.Sequential(nn.Linear(3, 2)), "all-linear", layer=layer)


def test_a_lora_layer_has_no_options_of_its_own():
    with pytest.raises(TypeError, match="renorm"):
        LoRALinear(3, 2, renorm=True)
