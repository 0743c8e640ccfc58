"""LPF-SGD, RWP, m-RWP, ARWP and Flat-LoRA's ablations against closed forms and explicit noise."""

import math

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
    trainable,
)
from torch import nn

import flatkern
from flatkern.methods import ARWP, LPFSGD, RWP, FlatLoRA, LoRA, MixedRWP
from flatkern.nn import DoRALinear

F64 = torch.float64


class Bowl(nn.Module):
    """L = w' diag(1, 2) w / 2 at w = (3, 4)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=F64))

    def forward(self, _=None):
        return (self.w.square() * torch.tensor([1.0, 2.0], dtype=F64)).sum() / 2


def bowl_steps(method_type, steps, batches=(None,), **options):
    """Losses and gradients of steps that move nothing."""
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.w.grad[0].clone()))
    method = method_type(model, optimizer, **options)
    losses = [method.step(model, list(batches)) for _ in range(steps)]
    return torch.tensor(losses, dtype=F64), torch.stack(gradients)


# S on the bowl: gaussian 0.3; row 0.3 ||w|| = 1.5; element 0.3 |w|; flat_lora 1.5 / sqrt(2).
SCALES = {
    "gaussian": (0.3, 0.3),
    "matrix": (1.5, 1.5),
    "element": (0.9, 1.2),
    "row": (1.5, 1.5),
    "flat_lora": (1.5 / 2**0.5, 1.5 / 2**0.5),
}


@pytest.mark.parametrize("strategy", SCALES)
def test_rwp_has_the_loss_and_the_gradient_of_the_smoothed_bowl(strategy):
    # E L = L + 1/2 sum S^2 H and E g = g, for every strategy.
    losses, gradients = bowl_steps(RWP, 225, sigma=0.3, strategy=strategy)
    expected = 20.5 + 0.5 * sum(
        s * s * h for s, h in zip(SCALES[strategy], (1.0, 2.0), strict=True)
    )
    assert abs(losses.mean() - expected) < tolerances.Z_SCORE * losses.std() / 15
    z = (gradients.mean(0) - torch.tensor([3.0, 8.0], dtype=F64)) / (gradients.std(0) / 15)
    assert z.abs().max() < tolerances.Z_SCORE
    # The spread of the gradient is H S: chi-square with 224 degrees.
    spread = gradients.std(0) / torch.tensor([1.0, 2.0], dtype=F64)
    ratio = spread / torch.tensor(SCALES[strategy], dtype=F64)
    assert (ratio - 1).abs().max() < tolerances.Z_SCORE / math.sqrt(2 * 224)


def test_lpf_has_the_clean_gradient_in_the_mean():
    losses, gradients = bowl_steps(LPFSGD, 200, batches=[None, None], sigma=0.3)
    expected = 20.5 + 0.5 * 1.5**2 * 3
    assert abs(losses.mean() - expected) < tolerances.Z_SCORE * losses.std() / math.sqrt(200)
    z = (gradients.mean(0) - torch.tensor([3.0, 8.0], dtype=F64)) / gradients.std(0) * 200**0.5
    assert z.abs().max() < tolerances.Z_SCORE
    # Two draws a step: half the variance of one.
    ratio = gradients.std(0) / torch.tensor([1.5, 3.0], dtype=F64) * 2**0.5
    assert (ratio - 1).abs().max() < tolerances.Z_SCORE / math.sqrt(2 * 200)


def watched(method_type, model, batches, steps=1, lr=0.0, **options):
    """The parameters at every call of the loss, and the method."""
    seen = []

    def loss_fn(batch):
        seen.append((batch, copies(model)))
        return loss_fn_of(model)(batch)

    method = method_type(model, sgd(model, lr=lr), **options)
    for _ in range(steps):
        method.step(loss_fn, batches)
    return seen, method


def noisy(model, before, name, scale, *key):
    """The weight under noise with this row scale."""
    weight = before[name]
    operand = flatkern.NoiseKey(*key).to("cpu")
    return flatkern.ops.perturb(weight, scale.float(), operand)


ADAPTERS = {"0.lora_A": 2**31, "0.lora_B": 2**31 + 1, "2.lora_A": 2**31 + 2, "2.lora_B": 2**31 + 3}


def test_lpf_draws_for_every_micro_batch_and_grows_to_one_plus_alpha():
    model = make_model()
    before = copies(model)
    options = {"sigma": 0.01, "alpha": 3.0, "total_steps": 2, "seed": 4}
    seen, method = watched(LPFSGD, model, make_batches(3), steps=3, **options)
    assert len(seen) == 9
    assert method.noise.step == 3
    for index, (_, values) in enumerate(seen):
        step, draw = divmod(index, 3)
        sigma = 0.01 * (1.0, 2.5, 4.0)[step]
        for name, number in ADAPTERS.items():
            scale = flatkern.ops.row_norm(before[name]) * sigma
            expected = noisy(model, before, name, scale, 4, step, draw, number)
            tolerances.assert_same_bits(values[name], expected)
        tolerances.assert_same_bits(values["0.weight"], before["0.weight"])


def test_rwp_draws_once_a_step():
    model = make_model()
    before = copies(model)
    seen, _ = watched(RWP, model, make_batches(2), steps=2, sigma=0.1, seed=3)
    for index, (_, values) in enumerate(seen):
        for name, number in ADAPTERS.items():
            scale = torch.full(before[name].shape[:1], 0.1)
            expected = noisy(model, before, name, scale, 3, index // 2, 0, number)
            tolerances.assert_same_bits(values[name], expected)


def test_rwp_on_the_base_weights_with_flat_loras_scale_is_flat_lora():
    # At B = 0 the rows of W' are those of W.
    results = []
    for method_type, options in (
        (FlatLoRA, {}),
        (RWP, {"scope": "origin", "strategy": "flat_lora"}),
    ):
        model = make_model()
        for layer in (model[0], model[2]):
            layer.lora_B.data.zero_()
            layer.register_parameter("bias", None)
        watched(method_type, model, make_batches(2), lr=0.1, sigma=0.3, **options)
        results.append(copies(model))
    assert_parameters(model, results[0])


def test_mixed_rwp_on_the_bowl():
    # With one batch g = grad L + lam H e; for e = (0.1, -0.2), lam = 0.5 that is (3.05, 7.8).
    _, noise = bowl_steps(RWP, 3, sigma=0.3, strategy="row")
    e = noise / torch.tensor([1.0, 2.0], dtype=F64) - torch.tensor([3.0, 4.0], dtype=F64)
    for lam in (0.0, 0.25, 0.5, 1.0):
        _, mixed = bowl_steps(MixedRWP, 3, sigma=0.3, lam=lam)
        expected = torch.tensor([3.0, 8.0], dtype=F64) + lam * e * torch.tensor([1.0, 2.0])
        torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("split", "count", "clean", "noisy_ones"),
    [
        ("halves", 1, [0], [0]),
        ("halves", 2, [0], [1]),
        ("halves", 3, [0, 1], [1, 2]),
        ("halves", 4, [0, 1], [2, 3]),
        ("last", 1, [0], [0]),
        ("last", 3, [0, 1, 2], [2]),
    ],
)
def test_which_batches_mixed_rwp_perturbs(split, count, clean, noisy_ones):
    model = make_model()
    before = copies(model)
    batches = make_batches(count)
    seen, _ = watched(MixedRWP, model, batches, split=split)
    got = []
    for batch, values in seen:
        index = [batch is other for other in batches].index(True)
        got.append((index, torch.equal(values["0.lora_A"], before["0.lora_A"])))
    assert got == [(index, True) for index in clean] + [(index, False) for index in noisy_ones]


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixed_rwp_is_its_two_parts(lam):
    batches = make_batches(4, F64)
    options = {"sigma": 0.2, "seed": 5}
    clean, clean_loss = step_gradients(Case(LoRA), make_model(F64), batches[:2])
    rwp = Case(RWP, {"strategy": "row", **options})
    rough, rough_loss = step_gradients(rwp, make_model(F64), batches[2:])
    mixed, loss = step_gradients(Case(MixedRWP, {"lam": lam, **options}), make_model(F64), batches)
    for name, value in mixed.items():
        expected = (1 - lam) * clean[name] + lam * rough[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        if lam in (0.0, 1.0):
            tolerances.assert_same_bits(value, (clean, rough)[int(lam)][name])
    assert loss == pytest.approx((1 - lam) * clean_loss + lam * rough_loss, rel=1e-12)


@pytest.mark.parametrize("scope", ["trainable", "merged", "full"])
def test_arwp_without_eta_is_rwp(scope):
    results = []
    for method_type, options in ((ARWP, {"eta": 0.0}), (RWP, {"strategy": "row"})):
        model = make_model()
        for layer in (model[0], model[2]):
            layer.register_parameter("bias", None)
        method = method_type(model, sgd(model, lr=0.01), sigma=0.1, scope=scope, **options)
        for _ in range(3):
            method.step(loss_fn_of(model), make_batches(2))
        results.append(copies(model))
    assert_parameters(model, results[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_arwps_estimate_and_what_it_does(scaled):
    # A linear loss has the same gradient anywhere: F is a geometric sum, exactly known.
    model = nn.Linear(3, 2, dtype=F64)
    slope = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]], dtype=F64)
    seen = []

    def loss_fn(_):
        seen.append(copies(model))
        return (model.weight * slope).sum() + 2 * model.bias.sum()

    before = copies(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = ARWP(model, optimizer, sigma=0.1, eta=0.5, beta=0.5, scaler=scaler)
    for _ in range(4):
        method.step(loss_fn, [None, None])
    sums = {"weight": torch.tensor([9.0, 25.0]), "bias": torch.tensor([4.0, 4.0])}
    for step in range(4):
        with flatkern.backend("reference"):
            for number, (name, square) in enumerate(sums.items()):
                F = square * sum(0.5**k for k in range(step))
                whole = before[name].norm() if name == "bias" else before[name].norm(dim=1)
                scale = 0.1 * whole.double() / (1 + 0.5 * F.double()).sqrt()
                expected = noisy(model, before, name, scale.expand(2), 0, step, 0, number)
                torch.testing.assert_close(seen[2 * step][name], expected, rtol=1e-5, atol=1e-6)
    state = method.state_dict()["fisher"]
    for name, square in sums.items():
        torch.testing.assert_close(state[name].double(), square.double() * 1.875)


KINDS = [{}, {"layer": DoRALinear}, {"layer": DoRALinear, "renorm": True}]


def make_kind(kind):
    model = make_model(F64, **kind)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_magnitude"):
                value.mul_(torch.linspace(0.5, 2, len(value), dtype=F64))
    return model


# Few tokens, and more than a weight has entries: both forms of the gradient of a frozen weight.
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("method_type", [ARWP, MixedRWP])
@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "renorm"])
def test_arwp_estimates_frozen_weights_from_the_noisy_pass(method_type, rows, kind):
    model = make_kind(kind)
    batches = make_batches(2, F64, rows)
    options = {"lam": 0.3, "split": "last"} if method_type is MixedRWP else {}
    method = method_type(
        model, sgd(model, lr=0.0), sigma=0.2, scope="merged", strategy="fisher", **options
    )
    method.step(loss_fn_of(model), batches)
    twin = make_kind(kind)
    for layer in (twin[0], twin[2]):
        layer.weight.requires_grad_(True)
    noise = flatkern.WeightNoise(twin, 0.2, strategy="row")
    used = batches[-1:] if options else batches
    with noise.window():
        for batch in used:
            (loss_fn_of(twin)(batch) / len(used)).backward()
    state = method.state_dict()["fisher"]
    assert state.keys() == {"0.weight", "2.weight"}
    for name, rows_of in state.items():
        expected = twin.get_parameter(name).grad.square().sum(1)
        torch.testing.assert_close(rows_of.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_marwp_estimates_trained_weights_from_the_noisy_pass_alone(scaled):
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    batches = make_batches(2)
    options = {"sigma": 0.2, "seed": 2}
    method = MixedRWP(model, sgd(model, 0.0), strategy="fisher", lam=0.3, scaler=scaler, **options)
    method.step(loss_fn_of(model), batches)
    rough, _ = step_gradients(Case(RWP, {"strategy": "row", **options}), make_model(), batches[1:])
    for name, rows in method.state_dict()["fisher"].items():
        expected = rough[name].square().sum(1)
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-9)


def test_fisher_is_refused_where_there_is_nothing_to_estimate_from():
    for method_type in (ARWP, lambda *args, **o: MixedRWP(*args, strategy="fisher", **o)):
        model = make_model()
        for scope in ("origin", "full", "all"):
            with pytest.raises(ValueError, match=r"scope must leave out frozen .*'0\.bias'"):
                method_type(model, sgd(model), scope=scope)
        for scope in ("merged", "lora", "trainable"):
            method_type(model, sgd(model), scope=scope)
    for method_type in (RWP, LPFSGD, FlatLoRA):
        with pytest.raises(ValueError, match="fisher"):
            method_type(model, sgd(model), strategy="fisher")
    with pytest.raises(ValueError, match="fisher"):
        ARWP(model, sgd(model), strategy="row")


def test_flat_lora_on_the_factors_has_its_mean_square():
    # E ||e_W||^2 = s^2 sigma^2 (sum_k ||B_k||^2 ||A_k||^2 + (1 + sigma^2) ||B||^2 ||A||^2 / r).
    model = make_model(F64)
    layer = model[0]
    A, B, s, sigma = layer.lora_A.detach(), layer.lora_B.detach(), 8.0, 0.5
    own = (B.norm(dim=0) * A.norm(dim=1)).square().sum()
    expected = s * s * sigma**2 * (own + (1 + sigma**2) * (B.norm() * A.norm()) ** 2 / 2)
    noise = flatkern.WeightNoise(model, sigma, scope="lora")
    clean, squares = s * (B @ A), []
    for step in range(200):
        with noise.window(step=step):
            moved = s * (layer.lora_B.detach() @ layer.lora_A.detach()) - clean
        squares.append(moved.square().sum())
    squares = torch.stack(squares)
    assert abs(squares.mean() - expected) < tolerances.Z_SCORE * squares.std() / 200**0.5
    # And sharply enough to tell the term with 1 + sigma^2 from one without.
    assert squares.std() / 200**0.5 < 0.08 * expected


WRONG = [
    (LPFSGD, {"alpha": -1.0}, ValueError),
    (LPFSGD, {"total_steps": 0}, ValueError),
    (LPFSGD, {"total_steps": 5, "schedule": flatkern.constant()}, ValueError),
    (RWP, {"sigma": -1.0}, ValueError),
    (RWP, {"sigma": math.nan}, ValueError),
    (RWP, {"scope": "base"}, ValueError),
    (MixedRWP, {"lam": -0.1}, ValueError),
    (MixedRWP, {"lam": 1.1}, ValueError),
    (MixedRWP, {"lam": math.nan}, ValueError),
    (MixedRWP, {"lam": "1"}, TypeError),
    (MixedRWP, {"split": "first"}, ValueError),
    (MixedRWP, {"beta": 1.0}, ValueError),
    (MixedRWP, {"eta": -1.0}, ValueError),
    (ARWP, {"beta": 1.0}, ValueError),
    (ARWP, {"beta": -0.5}, ValueError),
    (ARWP, {"eta": -0.5}, ValueError),
    (ARWP, {"eta": math.nan}, ValueError),
]


@pytest.mark.parametrize(("method_type", "option", "error"), WRONG)
def test_options_are_checked(method_type, option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        method_type(model, sgd(model), **option)


def test_defaults_need_nothing_but_a_model():
    for method_type in (LPFSGD, RWP, MixedRWP, ARWP):
        model = make_model()
        method_type(model, torch.optim.SGD(trainable(model), lr=0.1)).step(
            loss_fn_of(model), make_batches(1)
        )
