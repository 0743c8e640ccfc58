"""Adapters that do not start at zero, over an offset base: PiSSA and LoRA-GA."""

import copy

import pytest
import tolerances
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import flatkern
from flatkern.nn import DoRALinear, LoRALinear, NoRALinear, lora_ga_init, replace_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def linear_layer(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(24, 17, dtype=dtype)


def pissa(linear, **options):
    options = {"r": 4, "lora_alpha": 12, "init_lora_weights": "pissa", **options}
    return LoRALinear.from_linear(linear, **options)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 17}], ids=str)
def test_pissa_is_the_truncated_svd(options):
    linear = linear_layer(torch.float64)
    layer = pissa(linear, **options)
    r = layer.r
    u, sizes, vh = torch.linalg.svd(linear.weight.detach())
    principal = (u[:, :r] * sizes[:r]) @ vh[:r]
    product = layer.scaling * layer.lora_B @ layer.lora_A
    tolerances.assert_within(product, principal, 1e-13)
    tolerances.assert_within(layer.weight, linear.weight - principal, 1e-13)
    # The root of the singular values on either side.
    for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
        tolerances.assert_within(gram, (sizes[:r] / layer.scaling).diag(), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_pissa_equals_peft(dtype):
    linear = linear_layer(dtype)
    layer = pissa(copy.deepcopy(linear))
    config = LoraConfig(target_modules=["0"], r=4, lora_alpha=12, init_lora_weights="pissa")
    theirs = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    for name in ("lora_A", "lora_B"):
        value = getattr(layer, name).detach()
        # PEFT rounds its adapters to the weight's dtype after it has taken the residual.
        bound = 1e-6 + tolerances.ulp(value, dtype)
        tolerances.assert_within(value, getattr(theirs, name)["default"].weight, bound)
    # Another order of the sums: it may round to the neighbour.
    bound = 1e-6 + tolerances.ulp(layer.weight.detach(), dtype)
    tolerances.assert_within(layer.weight, theirs.base_layer.weight, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pissa_leaves_the_linear_layer_and_who_shares_its_weight(dtype):
    linear = linear_layer(dtype)
    embedding = nn.Embedding(17, 24)
    embedding.weight = linear.weight
    before = linear.weight.detach().clone()
    layer = pissa(linear)
    assert linear.weight is embedding.weight
    assert linear.weight.requires_grad
    tolerances.assert_same_bits(linear.weight, before)
    assert layer.weight is not linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_residual_does_not_add_up_to_the_weight_again(dtype):
    # The trap: W' at the start is off by the residual's rounding, half an ulp of the residual, of
    # which float32 adapters know nothing.
    torch.manual_seed(0)
    u, v = torch.randn(64, 1), torch.randn(1, 48)
    linear = nn.Linear(48, 64, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(u @ v + 0.05 * torch.randn(64, 48))
    layer = pissa(linear, r=1)
    exact = linear.weight.double()
    start = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    off = (start - exact).detach().abs()
    half_ulp = tolerances.ulp(layer.weight.detach(), dtype) / 2
    # The product in float32.
    slack = 4 * tolerances.ulp(exact.abs() + layer.weight.double().abs(), torch.float32)
    tolerances.assert_within(start, exact, half_ulp + slack)
    assert (off > slack).double().mean() > 0.8
    # Small beside the weight's own rounding where the adapters hold most of the weight.
    assert off.norm() < 0.1 * (tolerances.ulp(exact.detach(), dtype) / 2).norm()
    # Merged, it is one more rounding to the weight's dtype.
    bound = half_ulp + tolerances.ulp(start.detach(), dtype) / 2 + slack
    tolerances.assert_within(layer.merged_weight(), exact, bound)
    assert not torch.equal(layer.merged_weight(), linear.weight)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_noise_is_of_the_merged_weight_and_not_of_the_residual(mode):
    # With r = min(m, n) nothing is left in the base; the noise must not vanish.
    layer = pissa(linear_layer(), r=17)
    assert layer.weight.norm() < 1e-5
    model = nn.Sequential(layer)
    expected = 0.1 / 24**0.5 * linear_layer().weight.detach().double().norm(dim=1)
    with flatkern.WeightNoise(model, 0.1, mode=mode).window():
        tolerances.assert_within(layer._window.row_scale, expected, 1e-6 * expected)


def test_pissa_in_a_model_and_its_state_dict():
    model = nn.Sequential(linear_layer(), nn.Linear(17, 5))
    x = torch.randn(3, 24)
    expected = model(x)
    weight = model[0].weight
    replace_linear(model, "all-linear", r=2, init_lora_weights="pissa")
    torch.testing.assert_close(model(x), expected)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == {f"{i}.lora_{part}" for i in (0, 1) for part in "AB"}
    assert not any(value is weight for value in model.parameters())
    with torch.no_grad():
        model[0].lora_B.mul_(2)
    for init in ("pissa", True):
        other = nn.Sequential(linear_layer(), nn.Linear(17, 5))
        replace_linear(other, "all-linear", r=2, init_lora_weights=init)
        other.load_state_dict(model.state_dict())
        tolerances.assert_same_bits(other(x), model(x))
        assert other.state_dict().keys() == model.state_dict().keys()
        tolerances.assert_same_bits(other[0].offset_B, model[0].offset_B)


def test_pissa_needs_as_many_singular_values():
    model = nn.Sequential(linear_layer(), nn.Linear(17, 3))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="r must be at most 3"):
        replace_linear(model, "all-linear", r=4, init_lora_weights="pissa")
    assert type(model[0]) is nn.Linear
    assert all(value.requires_grad for value in model.parameters())
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 10, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 9, dtype=dtype)

    def forward(self, x):
        return self.second(self.drop(torch.tanh(self.first(x))))


def adapted(dtype=torch.float64, **options):
    model = Net(dtype)
    replace_linear(model, "all-linear", **{"r": 3, "lora_alpha": 6, **options})
    return model


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(3, 8, 12, generator=generator, dtype=torch.float64).to(dtype))


def loss_of(model):
    return lambda x: model(x).square().mean()


def dense_gradients(model):
    """Of the plain model in evaluation mode, by autograd."""
    model.eval()
    sum(loss_of(model)(x) for x in batches()).backward()
    return {name: model.get_submodule(name).weight.grad / 3 for name in ("first", "second")}


@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("gamma", [16.0, 4])
def test_lora_ga_is_the_svd_of_the_gradient(gamma, layer):
    plain = Net()
    gradients = dense_gradients(plain)
    model = adapted(layer=layer).train()
    lora_ga_init(model, loss_of(model), iter(batches()), gamma=gamma)
    for name, gradient in gradients.items():
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight.detach()
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        size = weight.shape[0] ** 0.25 / gamma**0.5
        # Up to the sign of each singular vector.
        for got, expected in ((layer.lora_A, vh[:3]), (layer.lora_B.T, u[:, 3:6].T)):
            signs = (got * expected).sum(1, keepdim=True).sign()
            tolerances.assert_within(got, size * signs * expected, 1e-9)
        tolerances.assert_within(
            layer.weight, weight - layer.scaling * layer.lora_B @ layer.lora_A, 1e-14
        )
    x = batches()[0]
    tolerances.assert_within(model.eval()(x), plain(x), 1e-6 if layer is DoRALinear else 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_ga_starts_at_the_weight(dtype):
    plain = Net(dtype)
    model = adapted(dtype)
    lora_ga_init(model, loss_of(model), batches(dtype))
    for name in ("first", "second"):
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight.detach()
        wide = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        bound = tolerances.ulp(layer.weight.detach(), dtype) / 2 + 1e-6
        tolerances.assert_within(wide, weight, bound)


def test_the_first_step_of_lora_ga_goes_along_the_gradient():
    # What it is for: -(dB A + B dA) of one gradient step has a far larger cosine with the full
    # gradient than plain LoRA's, and the theorem's best rank-2r approximation of it.
    plain = Net()
    gradients = dense_gradients(plain)
    model = adapted()
    lora_ga_init(model, loss_of(model), batches())
    model.eval()
    (sum(loss_of(model)(x) for x in batches()) / 3).backward()
    for name, gradient in gradients.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            change = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
            u, sizes, vh = torch.linalg.svd(gradient, full_matrices=False)
            best = (u[:, :6] * sizes[:6]) @ vh[:6]
            cosine = F.cosine_similarity(change.flatten(), best.flatten(), dim=0)
        assert cosine > 1 - 1e-9, name


def test_lora_ga_touches_nothing_else():
    model = adapted(torch.float32).train()
    model.drop.eval()
    model.extra = nn.Parameter(torch.ones(3))
    shared = model.first.weight
    model.tied = nn.Linear(12, 10)
    model.tied.weight = shared
    modes = [module.training for module in model.modules()]
    adapters = [p for p in model.parameters() if p.requires_grad]
    before = shared.detach().clone()
    lora_ga_init(model, loss_of(model), batches(torch.float32))
    assert model.tied.weight is shared
    assert model.first.weight is not shared
    tolerances.assert_same_bits(shared, before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    # The same parameters: an optimizer made before goes on.
    assert [id(p) for p in model.parameters() if p.requires_grad] == list(map(id, adapters))


def snapshot(model):
    flags = [p.requires_grad for p in model.parameters()]
    return flags, [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    flags, ids, state = snapshot(model)
    assert flags == before[0]
    assert ids == before[1]
    assert state.keys() == before[2].keys()
    for name, value in state.items():
        tolerances.assert_same_bits(value, before[2][name])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "batches", "commit"])
def test_an_exception_changes_nothing(error, where, monkeypatch):
    model = adapted(torch.float32)
    before = snapshot(model)
    loss_fn, data = loss_of(model), batches(torch.float32)
    if where == "loss":

        def loss_fn(x):
            raise error

    elif where == "batches":

        def broken():
            yield batches(torch.float32)[0]
            raise error

        data = broken()
    else:
        rebase, calls = LoRALinear.rebase, []

        def fail_at_second(self, *args):
            rebase(self, *args)
            calls.append(self)
            if len(calls) == 2:
                raise error

        monkeypatch.setattr(LoRALinear, "rebase", fail_at_second)
    with pytest.raises(error):
        lora_ga_init(model, loss_fn, data)
    assert_unchanged(model, before)


def merged():
    model = adapted()
    model.second.merge()
    return model


def trained():
    model = adapted()
    with torch.no_grad():
        model.first.lora_B[0, 0] = 1
    return model


def with_nora():
    model = Net()
    replace_linear(model, ["first"], r=3)
    model.second = NoRALinear.from_linear(model.second, r=3)
    return model


def unreached():
    model = adapted()
    model.more = LoRALinear(12, 12, dtype=torch.float64, r=2)
    return model


BAD = [
    (lambda: 3, {}, TypeError, "model"),
    (Net, {}, ValueError, "LoRALinear"),
    (merged, {}, RuntimeError, "second is merged"),
    (trained, {}, ValueError, "first must be fresh"),
    (lambda: adapted(init_lora_weights="pissa"), {}, ValueError, "first must be fresh"),
    (with_nora, {}, ValueError, "second must be a LoRALinear or DoRALinear, got NoRALinear"),
    (unreached, {}, ValueError, "of norm 0 for more"),
    (lambda: adapted(r=5), {}, ValueError, r"second\.r must be at most 4"),
    (adapted, {"gamma": 0}, ValueError, "gamma"),
    (adapted, {"gamma": float("nan")}, ValueError, "gamma"),
    (adapted, {"gamma": "16"}, TypeError, "gamma"),
    (adapted, {"batches": []}, ValueError, "batches"),
    (adapted, {"batches": 3}, TypeError, "batches"),
    (adapted, {"loss_fn": 3}, TypeError, "loss_fn"),
    (adapted, {"loss_fn": lambda x: 0.5}, TypeError, "loss"),
    (adapted, {"loss_fn": lambda x: x.sum()}, ValueError, "loss"),
    (adapted, {"loss_fn": lambda x: x.requires_grad_()}, ValueError, "loss must be a scalar"),
    (adapted, {"batches": [batches()[0] / 0]}, ValueError, "finite gradient"),
]


@pytest.mark.parametrize(("make", "options", "error", "text"), BAD)
def test_bad_input_changes_nothing(make, options, error, text):
    model = make()
    known = isinstance(model, nn.Module)
    before = snapshot(model) if known else None
    arguments = {"loss_fn": loss_of(model), "batches": batches(), **options}
    with pytest.raises(error, match=text):
        lora_ga_init(model, **arguments)
    if known:
        assert_unchanged(model, before)


def test_in_a_window_it_is_refused():
    model = adapted()
    with flatkern.WeightNoise(model).window(), pytest.raises(RuntimeError, match="window"):
        lora_ga_init(model, loss_of(model), batches())
