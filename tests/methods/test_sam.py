"""SAM, ASAM and LoRA-SAM against closed forms and dense autograd in float64."""

import contextlib

import pytest
import tolerances
import torch
from method_cases import (
    Case,
    assert_parameters,
    copies,
    loss_fn_of,
    make_batches,
    make_model,
    sgd,
    step_gradients,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flatkern.methods import ASAM, SAM, LoRASAM
from flatkern.methods._layers import WeightGradient

F64 = torch.float64


class Bowl(nn.Module):
    """L = w' diag(1, 2) w / 2 at w = (3, 4)."""

    def __init__(self, shape=(1, 2)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=F64).view(shape))

    def forward(self, _):
        return (self.w.square() * torch.tensor([1.0, 2.0], dtype=F64)).sum() / 2


def bowl_gradient(method_type, shape=(1, 2), **options):
    model = Bowl(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = method_type(model, optimizer, **options).step(model, [None])
    return (torch.tensor([3.0, 4.0], dtype=F64) - model.w.detach().flatten()), loss


def test_sam_on_the_bowl():
    # g = (3, 8); e = 0.5 g / sqrt(73) = (0.1756, 0.4682); g at w + e = (3.1756, 8.9363).
    gradient, loss = bowl_gradient(SAM, rho=0.5)
    expected = torch.tensor([3 + 1.5 / 73**0.5, 2 * (4 + 4 / 73**0.5)], dtype=F64)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, torch.tensor([3.1756, 8.9363], dtype=F64), rtol=0, atol=5e-5
    )
    value = expected[0] ** 2 / 2 + expected[1] ** 2 / 4
    assert loss == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        # T = (3.01, 4.01): e = 0.5 T^2 g / ||T g||.
        ({"eta": 0.01}, (1, 2), (0.4078, 1.9300)),
        ({}, (1, 2), (0.4078, 1.9300)),
        # T = (3, 4): 0.5 (27, 128) / ||(9, 32)||.
        ({"preset": "davda54"}, (1, 2), (0.4061, 1.9253)),
        ({"preset": "davda54"}, (2,), (0.4061, 1.9253)),
        # T = 1 for a vector: SAM's step.
        ({}, (2,), (0.1756, 0.4682)),
    ],
    ids=str,
)
def test_asam_on_the_bowl(options, shape, expected):
    gradient, _ = bowl_gradient(ASAM, shape, **options)
    step = torch.stack([gradient[0] - 3, gradient[1] / 2 - 4])
    torch.testing.assert_close(step, torch.tensor(expected, dtype=F64), rtol=0, atol=5e-5)


def test_asam_does_not_see_a_rescaling():
    # w -> diag(a) w with the loss unchanged as a function: e scales with w.
    model = Bowl()
    model.w.data *= torch.tensor([10.0, 0.1], dtype=F64)
    scale = torch.tensor([0.1, 10.0], dtype=F64)

    def loss_fn(_):
        return ((model.w * scale).square() * torch.tensor([1.0, 2.0], dtype=F64)).sum() / 2

    method = ASAM(model, torch.optim.SGD(model.parameters(), lr=1.0), preset="davda54")
    _, expected = bowl_gradient(ASAM, preset="davda54")
    assert method.step(loss_fn, [None]) == pytest.approx(expected, rel=1e-12)


def dense_gradients(model, parameters, batches):
    """The mean gradient at these parameters, by autograd on a pure function of them."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    losses = [functional_call(model, parameters, batch).square().mean() for batch in batches]
    return dict(
        zip(
            parameters,
            torch.autograd.grad(sum(losses) / len(losses), list(parameters.values())),
            strict=True,
        )
    )


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def assert_gradients(got, expected, names):
    assert got.keys() == set(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["joint", "per_tensor"])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("method", [SAM, LoRASAM])
def test_sam_is_the_gradient_at_the_perturbed_point(method, norm, last_only):
    model = make_model(F64)
    model[2].bias.requires_grad_(True)
    before, batches = copies(model), make_batches(3, F64)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    clean = dense_gradients(model, before, batches)
    moved = names if method is SAM else names - {"2.bias"}
    total = norm_of(clean[name] for name in moved)
    adversarial = dict(before)
    for name in moved:
        size = total if norm == "joint" else clean[name].norm()
        adversarial[name] = before[name] + 0.3 * clean[name] / size
    expected = dense_gradients(model, adversarial, batches[-1:] if last_only else batches)
    case = Case(method, {"rho": 0.3, "norm": norm, "last_only": last_only})
    got, _ = step_gradients(case, model, batches)
    assert_gradients(got, expected, names)
    assert_parameters(model, before)


def test_lora_sam_moves_the_merged_weight_as_derived():
    # e_W = s^2 c (G A'A + B B'G) + s^3 c^2 G A'B'G.
    model = make_model(F64)
    batches = make_batches(1, F64)
    before = copies(model)
    seen = []

    def loss_fn(batch):
        seen.append([layer.merged_weight() for layer in (model[0], model[2])])
        return loss_fn_of(model)(batch)

    LoRASAM(model, sgd(model), rho=0.2).step(loss_fn, batches)
    clean = dense_gradients(model, before, batches)
    # At one point, the gradient of the merged weight is that of W.
    c = 0.2 / norm_of(grad for name, grad in clean.items() if "lora" in name)
    for index, s in ((0, 8.0), (2, 8.0)):
        A, B = before[f"{index}.lora_A"], before[f"{index}.lora_B"]
        G = clean[f"{index}.weight"]
        expected = s * s * c * (G @ A.t() @ A + B @ B.t() @ G)
        expected += s**3 * c * c * G @ A.t() @ B.t() @ G
        layer = index // 2
        torch.testing.assert_close(seen[1][layer] - seen[0][layer], expected, rtol=1e-9, atol=1e-12)


def test_lora_sam_at_zero_b_moves_b_alone():
    model = make_model(F64)
    for layer in (model[0], model[2]):
        layer.lora_B.data.zero_()
    seen = []

    def loss_fn(batch):
        seen.append(copies(model))
        return loss_fn_of(model)(batch)

    LoRASAM(model, sgd(model), rho=0.2).step(loss_fn, make_batches(1, F64))
    tolerances.assert_same_bits(seen[1]["0.lora_A"], seen[0]["0.lora_A"])
    assert norm_of(seen[1][f"{n}.lora_B"] for n in (0, 2)).item() == pytest.approx(0.2)


# 6 x 8 and 8 x 3 weights: up to 3 and 2 tokens are kept as tokens, more as a matrix.
@pytest.mark.parametrize("norm", ["joint", "per_tensor"])
@pytest.mark.parametrize(("count", "rows"), [(1, 2), (2, 1), (1, 20), (3, 2)])
def test_sam_over_merged_weights_is_dense_autograd(norm, count, rows):
    model = make_model(F64)
    before, batches = copies(model), make_batches(count, F64, rows)
    clean = dense_gradients(model, before, batches)
    weights = ["0.weight", "2.weight"]
    total = norm_of(clean[name] for name in weights)
    adversarial = dict(before)
    for name in weights:
        size = total if norm == "joint" else clean[name].norm()
        adversarial[name] = before[name] + 0.3 * clean[name] / size
    expected = dense_gradients(model, adversarial, batches)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    got, _ = step_gradients(
        Case(SAM, {"rho": 0.3, "scope": "merged", "norm": norm}), model, batches
    )
    assert_gradients(got, expected, names)
    assert_parameters(model, before)


def test_sam_over_merged_weights_keeps_the_smaller_form():
    layer = nn.Linear(64, 48, bias=False)
    gradient = WeightGradient(layer)
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape):
        return torch.randn(*shape, generator=generator)

    x, dy = tokens(2, 13, 64), tokens(2, 13, 48)
    gradient.add(x, dy)
    assert gradient._dense is None
    expected = dy.flatten(0, 1).t() @ x.flatten(0, 1)
    torch.testing.assert_close(gradient.norm(), expected.norm())
    probe = tokens(3, 5, 64)
    torch.testing.assert_close(gradient.product(probe), probe @ expected.t(), rtol=1e-5, atol=1e-4)
    x, dy = tokens(2, 64), tokens(2, 48)
    gradient.add(x, dy)
    expected += dy.t() @ x
    assert gradient._dense.shape == (48, 64)
    assert gradient._x == []
    torch.testing.assert_close(gradient.norm(), expected.norm())
    torch.testing.assert_close(gradient.product(probe), probe @ expected.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_sam_over_merged_weights_under_checkpointing(reentrant):
    results = []
    for checkpointed in (False, True):
        model = make_model(F64)

        def loss_fn(batch, model=model, checkpointed=checkpointed):
            batch = batch.clone().requires_grad_()
            if checkpointed:
                return checkpoint(model, batch, use_reentrant=reentrant).square().mean()
            return model(batch).square().mean()

        SAM(model, sgd(model, lr=1e-3), scope="merged").step(loss_fn, make_batches(2, F64))
        results.append(copies(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scope", ["trainable", "merged"])
def test_sam_under_an_autocast_around_the_step(scope):
    # autocast keeps the bfloat16 copies of float32 weights until it ends: both passes would see
    # the clean ones.
    results = []
    for around in (False, True):
        model = make_model()
        method = SAM(model, sgd(model, lr=1e-2), rho=0.5, scope=scope)

        def loss_fn(batch, model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_fn_of(model)(batch).float()

        outer = torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext()
        with outer:
            results.append([method.step(loss_fn, make_batches(2)) for _ in range(3)])
    assert results[0] == results[1]


@pytest.mark.parametrize("method_type", [SAM, ASAM, LoRASAM])
def test_a_zero_gradient_moves_nothing(method_type):
    model = make_model()
    before = copies(model)
    loss = method_type(model, sgd(model)).step(
        lambda batch: (model(batch) * 0).sum(), make_batches(1)
    )
    assert loss == 0.0
    assert_parameters(model, before)


def test_a_half_precision_step_is_rounded_once():
    # With the weight, and not by itself before: to one of the sum's two neighbours.
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(1000, 1, bias=False).to(torch.bfloat16)
    slope = torch.randn(1, 1000, generator=generator).to(torch.bfloat16)
    seen = []

    def loss_fn(_):
        seen.append(model.weight.detach().clone())
        return (model.weight * slope).sum()

    SAM(model, torch.optim.SGD(model.parameters(), lr=0.0), rho=1.0).step(loss_fn, [None])
    exact = seen[0].double() + slope.double() / slope.double().norm()
    # e is of float32 sums; rounded by itself it would be off by another ulp.
    error = (seen[1].double() - exact) / tolerances.ulp(exact, torch.bfloat16)
    assert error.abs().max() < 1.01


WRONG = [
    ({"rho": -0.1}, ValueError),
    ({"rho": float("nan")}, ValueError),
    ({"rho": "0.1"}, TypeError),
    ({"norm": "l2"}, ValueError),
    ({"last_only": 1}, TypeError),
]


@pytest.mark.parametrize("method_type", [SAM, ASAM, LoRASAM])
@pytest.mark.parametrize(("option", "error"), WRONG, ids=str)
def test_options_are_checked(method_type, option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        method_type(model, sgd(model), **option)


@pytest.mark.parametrize(
    ("method_type", "option"),
    [
        (SAM, {"scope": "all"}),
        (ASAM, {"eta": -1.0}),
        (ASAM, {"eta": float("nan")}),
        (ASAM, {"preset": "other"}),
    ],
    ids=str,
)
def test_options_of_one_method_are_checked(method_type, option):
    model = make_model()
    with pytest.raises(ValueError, match=next(iter(option))):
        method_type(model, sgd(model), **option)


@pytest.mark.parametrize("options", [{"scope": "merged"}, None])
def test_a_model_without_adapters(options):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must have LoRALinear layers"):
        LoRASAM(model, optimizer) if options is None else SAM(model, optimizer, **options)
    model = make_model()
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="adapters that are trained"):
        LoRASAM(model, sgd(model))
