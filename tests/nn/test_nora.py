"""NoRALinear and awsvd_init: closed forms of the gradients and of the best approximation."""

import copy

import pytest
import tolerances
import torch
from torch import nn
from torch.nn import functional as F

import flatkern
from flatkern.nn import LoRALinear, NoRALinear, awsvd_init, replace_linear

OUTER, INNER = ("lora_A", "lora_B"), ("nora_A", "nora_B")


def trained(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"r": 6, "lora_alpha": 9, "r_inner": 3, **options}
    layer = NoRALinear(20, 14, dtype=dtype, **options)
    with torch.no_grad():
        layer.nora_B.normal_(std=0.3)
    return layer


def test_what_is_trained():
    layer = trained(r=8, r_inner=None)
    assert layer.r_inner == 4
    shapes = {name: list(value.shape) for name, value in layer.adapters().items()}
    assert shapes == {"lora_A": [8, 20], "lora_B": [14, 8], "nora_A": [4, 8], "nora_B": [8, 4]}
    trainable = [name for name, value in layer.named_parameters() if value.requires_grad]
    assert trainable == list(INNER)
    assert "r_inner=4" in repr(layer)
    assert NoRALinear(6, 5, r=3).r_inner == 2


def test_gradients_are_the_closed_forms():
    layer = trained()
    x = torch.randn(7, 20, dtype=torch.float64)
    layer(x).square().sum().backward()
    with torch.no_grad():
        y = F.linear(x, layer.weight, layer.bias)
        a, b, inner_a, inner_b = (getattr(layer, name) for name in OUTER + INNER)
        s = 9 / 6
        y = y + s * x @ a.T @ inner_a.T @ inner_b.T @ b.T
        g = (2 * y).T @ x
        expected = {
            "nora_B": s * b.T @ g @ a.T @ inner_a.T,
            "nora_A": s * inner_b.T @ b.T @ g @ a.T,
        }
    for name, value in expected.items():
        tolerances.assert_within(getattr(layer, name).grad, value, 1e-12 * value.abs().max())
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None


def test_dropout_is_in_front_of_the_branch_alone():
    layer = trained(torch.float32, lora_dropout=0.5)
    x = torch.randn(4, 20)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    branch = dropped @ layer.lora_A.T @ layer.nora_A.T @ layer.nora_B.T @ layer.lora_B.T
    expected = F.linear(x, layer.weight, layer.bias) + layer.scaling * branch
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_start(init):
    torch.manual_seed(0)
    linear = nn.Linear(300, 200)
    layer = NoRALinear.from_linear(linear, r=64, r_inner=32, init_lora_weights=init)
    x = torch.randn(2, 300)
    assert torch.equal(layer(x), linear(x)) == (init is True)
    if init == "gaussian":
        assert abs(layer.nora_A.std() * 32 - 1) < 0.05
        assert abs(layer.nora_B.std() * 32 - 1) < 0.05
    else:
        # As nn.Linear: uniform within 1 / sqrt(64).
        assert 0.99 / 8 < layer.nora_A.abs().max() <= 1 / 8
        assert layer.nora_B.any() == (init is False)
    assert layer.lora_A.any()
    assert layer.lora_B.any()


def test_float32_factors_over_a_16_bit_weight():
    layer = trained(torch.bfloat16)
    assert {value.dtype for value in layer.adapters().values()} == {torch.float32}
    x = torch.randn(3, 20, dtype=torch.bfloat16)
    expected = F.linear(x.double(), layer.merged_weight().double(), layer.bias.double())
    assert layer(x).dtype == torch.bfloat16
    tolerances.assert_within(layer(x), expected, 4 * 2.0**-8 * expected.abs().max())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"r_inner": 0}, ValueError, "r_inner"),
        ({"r_inner": 9}, ValueError, r"r_inner must be in \[1, r = 8\]"),
        ({"r_inner": 2.0}, TypeError, "r_inner"),
        ({"renorm": True}, TypeError, "renorm"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights"),
    ],
)
def test_options_are_checked(options, error, text):
    linear = nn.Linear(12, 10)
    model = nn.Sequential(linear)
    with pytest.raises(error, match=text):
        NoRALinear.from_linear(linear, **options)
    with pytest.raises(error, match=text):
        replace_linear(model, "all-linear", layer=NoRALinear, **options)
    assert model[0] is linear
    assert linear.weight.requires_grad


class Net(nn.Module):
    """`second` sees other activations than the model's input; one layer more has no adapter."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 10, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 9, dtype=dtype)
        self.norm = nn.BatchNorm1d(9, dtype=dtype)

    def forward(self, x, scale=1.0):
        return self.norm(self.second(self.drop(torch.tanh(self.first(x * scale)))))


def adapted(dtype=torch.float64, **options):
    model = Net(dtype)
    options = {"r": 4, "lora_alpha": 8, "layer": NoRALinear, **options}
    replace_linear(model, "all-linear", **options)
    return model


def inputs(dtype=torch.float64):
    """Columns of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 12, generator=generator, dtype=torch.float64)
    return (x * torch.logspace(-1, 1, 12, dtype=torch.float64)).to(dtype)


def seen(model, batches):
    """What each layer of the plain model meets in evaluation mode."""
    first = torch.cat(list(batches))
    return {"first": first, "second": torch.tanh(model.first(first)).detach()}


DIAGONALS = {
    "l2": lambda x: x.square().sum(0).sqrt(),
    "mean_abs_sqrt": lambda x: x.abs().mean(0).sqrt(),
}


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_awsvd_is_the_best_approximation_there(diagonal, init):
    model = adapted(init_lora_weights=init).train()
    inner = {n: p.detach().clone() for n, p in model.named_parameters() if "nora" in n}
    batches = inputs()
    awsvd_init(model, batches, diagonal=diagonal)
    for name, x in seen(Net(), batches).items():
        layer = model.get_submodule(name)
        d = DIAGONALS[diagonal](x)
        product = layer.lora_B @ layer.lora_A
        sizes = torch.linalg.svdvals(layer.weight * d)
        error = ((layer.weight - product) * d).square().sum()
        torch.testing.assert_close(error, sizes[4:].square().sum(), rtol=1e-10, atol=0)
        # U_r S_r and V_r^T D^-1, not another factorisation of the same product.
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, (sizes[:4] ** 2).diag())
        gram = (layer.lora_A * d) @ (layer.lora_A * d).T
        torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64))
        spectral = torch.linalg.svdvals(layer.weight - product)[0]
        assert spectral <= sizes[4] / d.min() * (1 + 1e-12)
    for name, value in inner.items():
        tolerances.assert_same_bits(model.get_parameter(name), value)


def test_without_batches_it_is_the_plain_svd():
    layer = NoRALinear(12, 10, r=4, dtype=torch.float64)
    awsvd_init(layer)
    u, sizes, vh = torch.linalg.svd(layer.weight.detach())
    best = u[:, :4] @ sizes[:4].diag() @ vh[:4]
    tolerances.assert_within(layer.lora_B @ layer.lora_A, best, 1e-14)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_size_of_the_activations_does_not_matter(factor):
    models = [adapted(), adapted()]
    awsvd_init(models[0].first, inputs())
    awsvd_init(models[1].first, factor * inputs())
    products = [model.first.lora_B @ model.first.lora_A for model in models]
    tolerances.assert_within(products[1], products[0], 1e-13)


def test_kinds_of_batches():
    expected = adapted()
    awsvd_init(expected, inputs())
    kinds = [
        [(x, 1.0) for x in inputs()],
        [{"x": x, "scale": 1.0} for x in inputs()],
        iter(inputs()),
        [inputs().flatten(0, 1)],
    ]
    for batches in kinds:
        model = adapted()
        awsvd_init(model, batches)
        torch.testing.assert_close(model.second.lora_A, expected.second.lora_A)


def test_dead_columns_do_not_divide_by_zero():
    layer = NoRALinear(12, 10, r=4)
    x = inputs(torch.float32)
    x[..., 3] = 0
    awsvd_init(layer, x)
    assert layer.lora_A.isfinite().all()
    weight = layer.weight.detach()
    alive = [j for j in range(12) if j != 3]
    d = x.flatten(0, 1).square().sum(0).sqrt()[alive]
    error = ((weight - layer.lora_B @ layer.lora_A)[:, alive] * d).norm()
    best = torch.linalg.svdvals(weight[:, alive] * d)[4:].norm()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_but_the_outer_factors_changes(error):
    model = adapted(torch.float32, init_lora_weights=False).train()
    model.drop.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    scalings = model.first.scaling, model.second.scaling

    def batches():
        yield inputs(torch.float32)[0]
        if error is not None:
            raise error
        yield inputs(torch.float32)[1]

    if error is None:
        awsvd_init(model, batches())
    else:
        with pytest.raises(error):
            awsvd_init(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert (model.first.scaling, model.second.scaling) == scalings
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        if error is None and name.endswith(OUTER):
            assert not torch.equal(value, state[name])
        else:
            tolerances.assert_same_bits(value, state[name])


def merged():
    model = adapted(torch.float32, init_lora_weights=False)
    model.first.merge()
    return model


X = torch.randn(4, 12)
BAD = [
    (lambda: nn.Linear(3, 2), {"batches": [X]}, ValueError, "NoRALinear"),
    (lambda: nn.Sequential(LoRALinear(12, 3)), {"batches": [X]}, ValueError, "NoRALinear"),
    (lambda: 3, {"batches": [X]}, TypeError, "model"),
    (merged, {"batches": [X]}, RuntimeError, "first is merged"),
    (lambda: adapted(torch.float32), {"batches": 3}, TypeError, "batches"),
    (lambda: adapted(torch.float32), {"batches": []}, ValueError, "batches"),
    (lambda: adapted(torch.float32), {"batches": [0 * X]}, ValueError, "inputs of first"),
    (lambda: adapted(torch.float32), {"batches": [X / 0]}, ValueError, "inputs of first"),
    (lambda: adapted(torch.float32), {"diagonal": "mean"}, ValueError, "diagonal"),
    (lambda: adapted(torch.float32), {"diagonal": 2}, TypeError, "diagonal"),
    (lambda: adapted(torch.float32), {"floor": 0.0}, ValueError, "floor"),
    (lambda: adapted(torch.float32), {"floor": float("nan")}, ValueError, "floor"),
    (lambda: adapted(torch.float32, r=10), {}, ValueError, r"second\.r must be at most 9"),
]


@pytest.mark.parametrize(("make", "options", "error", "text"), BAD)
def test_awsvd_refuses_and_changes_nothing(make, options, error, text):
    model = make()
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=text):
        awsvd_init(model, **options)
    for name, value in state.items():
        tolerances.assert_same_bits(model.state_dict()[name], value)


def test_awsvd_needs_every_layer_to_be_reached():
    model = adapted(torch.float32)
    model.more = NoRALinear(4, 4, r=2)
    with pytest.raises(ValueError, match="none reached more"):
        awsvd_init(model, [X])


def test_awsvd_in_a_window_is_refused():
    model = adapted(torch.float32)
    with flatkern.WeightNoise(model).window(), pytest.raises(RuntimeError, match="window"):
        awsvd_init(model, [X])


def test_the_singular_start_is_awsvd_without_data():
    torch.manual_seed(0)
    linear = nn.Linear(20, 14)
    layer = NoRALinear.from_linear(linear, r=6, init_lora_weights="svd")
    u, sizes, vh = torch.linalg.svd(linear.weight.detach().double())
    torch.testing.assert_close(
        (layer.lora_B @ layer.lora_A).double(), u[:, :6] * sizes[:6] @ vh[:6], rtol=1e-4, atol=1e-5
    )
    # Eckart and Young: what is left has the other singular values.
    left = (linear.weight - layer.lora_B @ layer.lora_A).norm().double()
    torch.testing.assert_close(left, sizes[6:].norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(torch.eye(20)), linear(torch.eye(20)))
    other = NoRALinear.from_linear(linear, r=6)
    awsvd_init(other)
    for name in OUTER:
        tolerances.assert_same_bits(getattr(layer, name).detach(), getattr(other, name).detach())
    with pytest.raises(ValueError, match=r"r must be at most 14 with init_lora_weights='svd'"):
        NoRALinear(20, 14, r=15, init_lora_weights="svd")
    with pytest.raises(ValueError, match=r"LoRALinear: init_lora_weights must be another than"):
        LoRALinear(20, 14, init_lora_weights="svd")


def test_a_token_of_enormous_length_does_not_decide_a_robust_diagonal():
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 14), torch.randn(30, 20)
    loud = x.clone()
    loud[7] *= 1e4
    started = {}
    for diagonal in ("l2", "direction"):
        for name, batch in (("plain", x), ("loud", loud)):
            layer = NoRALinear.from_linear(linear, r=6)
            awsvd_init(layer, [batch], diagonal=diagonal)
            started[diagonal, name] = (layer.lora_B @ layer.lora_A).detach()
    assert (started["l2", "loud"] - started["l2", "plain"]).norm() > 0.1
    torch.testing.assert_close(started["direction", "loud"], started["direction", "plain"])
    d = (x / x.norm(dim=1, keepdim=True)).double().norm(dim=0)
    u, sizes, vh = torch.linalg.svd(linear.weight.detach().double() * d)
    expected = u[:, :6] * sizes[:6] @ vh[:6] / d
    torch.testing.assert_close(
        started["direction", "plain"].double(), expected, rtol=1e-4, atol=1e-5
    )
