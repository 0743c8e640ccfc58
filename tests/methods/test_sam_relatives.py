"""GSAM, Friendly-SAM, GAM, several ascents and schedules against closed forms and autograd."""

import copy
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
from torch.func import functional_call, grad, jvp

import flatkern
from flatkern.methods import ASAM, GAM, GSAM, SAM, EFMLoRA, FMLoRA, FriendlySAM, LoRASAM

F64 = torch.float64
H = torch.tensor([1.0, 2.0], dtype=F64)


class Bowl(nn.Module):
    """L = w' diag(1, 2) w / 2 at w = (3, 4)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=F64))

    def forward(self, _):
        return (self.w.square() * H).sum() / 2


def bowl_gradient(method_type, steps=1, **options):
    """The gradients of that many steps that move nothing."""
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.w.grad.clone()))
    method = method_type(model, optimizer, **options)
    for _ in range(steps):
        method.step(model, [None])
    return seen[0] if steps == 1 else seen


def dense_gradient(model, values, batches):
    """The mean gradient of the trained weights at these values of them, flat."""
    others = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(values):
        losses = [functional_call(model, {**others, **values}, b).square().mean() for b in batches]
        return sum(losses) / len(losses)

    return grad(loss)(values)


def along(values, way, length):
    """values + length way / ||way||, over all of them."""
    size = torch.cat([part.flatten() for part in way.values()]).norm()
    return {name: values[name] + length * way[name] / size for name in values}


def trained_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11)


# GSAM


def test_gsam_on_the_bowl():
    # g = (3, 8), g_p = H (w + 0.5 g / |g|); what g has across g_p is taken off.
    w, g = torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([3.0, 8.0], dtype=F64)
    g_p = H * (w + 0.5 * g / g.norm())
    across = g - (g @ g_p) / (g_p @ g_p) * g_p
    found = bowl_gradient(GSAM, rho=0.5, alpha=0.7)
    torch.testing.assert_close(found, g_p - 0.7 * across, rtol=1e-12, atol=1e-14)
    # In two dimensions: by the normal of g_p.
    normal = torch.stack([-g_p[1], g_p[0]]) / g_p.norm()
    torch.testing.assert_close(found @ normal, -0.7 * (g @ normal), rtol=1e-10, atol=0)
    torch.testing.assert_close(found @ g_p, g_p @ g_p, rtol=1e-12, atol=0)


@pytest.mark.parametrize("last_only", [False, True])
def test_gsam_is_dense_autograd(last_only):
    model, batches = make_model(F64), make_batches(3, F64)
    values = trained_values(model)
    g = dense_gradient(model, values, batches)
    g_p = dense_gradient(model, along(values, g, 0.3), batches[-1:] if last_only else batches)
    share = sum((g[n] * g_p[n]).sum() for n in g) / sum(g_p[n].square().sum() for n in g)
    expected = {n: g_p[n] - 0.4 * (g[n] - share * g_p[n]) for n in g}
    before = copies(model)
    got, _ = step_gradients(Case(GSAM, {"rho": 0.3, "last_only": last_only}), model, batches)
    assert_gradients(got, expected)
    assert_parameters(model, before)


@pytest.mark.parametrize(
    ("method_type", "options"),
    [
        (GSAM, {"alpha": 0.0}),
        (FriendlySAM, {"sigma": 0.0}),
        (SAM, {"ascents": 1, "schedule": flatkern.constant()}),
    ],
    ids=["GSAM", "FriendlySAM", "SAM"],
)
@pytest.mark.parametrize("norm", ["joint", "per_tensor"])
def test_the_relative_that_is_sam_has_its_bits(method_type, options, norm):
    results = []
    for kind, own in ((SAM, {}), (method_type, options)):
        model = make_model()
        method = kind(model, torch.optim.AdamW(trainable(model), lr=1e-2), norm=norm, **own)
        losses = [method.step(loss_fn_of(model), make_batches(2)) for _ in range(3)]
        results.append((losses, copies(model)))
    assert results[0][0] == results[1][0]
    assert_parameters(model, results[0][1])


# Friendly-SAM


def test_friendly_sam_follows_its_recursion():
    """Three steps of dense autograd: d = g - sigma m, then m <- lam m + (1 - lam) g."""
    options = {"rho": 0.3, "sigma": 0.8, "lam": 0.6}
    model = make_model(F64)
    method = FriendlySAM(model, sgd(model, lr=0.05), **options)
    values, mean = trained_values(model), None
    for step in range(3):
        batches = make_batches(step + 1, F64)
        g = dense_gradient(model, values, batches)
        d = g if mean is None else {n: g[n] - 0.8 * mean[n] for n in g}
        mean = g if mean is None else {n: 0.6 * mean[n] + 0.4 * g[n] for n in g}
        at = dense_gradient(model, along(values, d, 0.3), batches)
        values = {n: values[n] - 0.05 * at[n] for n in values}
        method.step(loss_fn_of(model), batches)
    for name, value in values.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-9, atol=1e-11)
    for name, value in method.state_dict()["mean"].items():
        torch.testing.assert_close(value, mean[name], rtol=1e-9, atol=1e-11)


def test_friendly_sam_without_news_climbs_nothing():
    """The same batch again, and w where it was: g - m = 0, and the gradient is the plain one."""
    plain, still = torch.tensor([3.0, 8.0], dtype=F64), bowl_gradient(FriendlySAM, 2, rho=0.5)
    torch.testing.assert_close(still[1], plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(still[0], bowl_gradient(SAM, rho=0.5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mean", "error"),
    [
        ({"other": torch.zeros(2)}, ValueError),
        ({"w": torch.zeros(3)}, ValueError),
        ({"w": 1.0}, TypeError),
        ([], TypeError),
    ],
    ids=str,
)
def test_friendly_sam_checks_its_state(mean, error):
    model = Bowl()
    method = FriendlySAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = method.state_dict()
    with pytest.raises(error, match="mean"):
        method.load_state_dict({**state, "mean": mean})
    assert method.state_dict() == state


# GAM


def test_gam_on_the_bowl():
    # All differences are exact on a quadratic: grad |grad L| = H g / |g|.
    w = torch.tensor([3.0, 4.0], dtype=F64)
    g = H * w
    f = H * g / g.norm()
    near = H * (w + 0.5 * f / f.norm())
    expected = g + 0.3 * 0.5 * H * near / near.norm()
    for delta in (0.02, 1.0):
        found = bowl_gradient(GAM, rho=0.5, alpha=0.3, delta=delta)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_gam_is_the_hessian_s():
    """Against products with the Hessian by forward-mode autograd, as delta goes to 0."""
    model, batches = make_model(F64), make_batches(2, F64)
    values = trained_values(model)

    def gradient(values):
        return dense_gradient(model, values, batches)

    def grad_norm_slope(values):
        g = gradient(values)
        unit = along({n: torch.zeros_like(v) for n, v in g.items()}, g, 1.0)
        return jvp(gradient, (values,), (unit,))[1]

    f = grad_norm_slope(values)
    h = grad_norm_slope(along(values, f, 0.2))
    clean = gradient(values)
    expected = {n: clean[n] + 0.5 * 0.2 * h[n] for n in h}
    before = copies(model)
    # The error of a forward difference is of the order of delta.
    errors = []
    for delta in (1e-3, 1e-4):
        options = {"rho": 0.2, "alpha": 0.5, "delta": delta}
        got, _ = step_gradients(Case(GAM, options), model, batches)
        errors.append(max((got[n] - expected[n]).abs().max().item() for n in expected))
    assert errors[1] < 1e-3 * max(0.1 * value.abs().max().item() for value in h.values())
    assert errors[1] < 0.2 * errors[0]
    assert_parameters(model, before)


# Several ascents


@pytest.mark.parametrize("ascents", [2, 3])
@pytest.mark.parametrize("method_type", [SAM, LoRASAM])
def test_several_ascents_are_dense_autograd(method_type, ascents):
    model, batches = make_model(F64), make_batches(2, F64)
    values = trained_values(model)
    moved = dict(values)
    for _ in range(ascents):
        moved = along(moved, dense_gradient(model, moved, batches), 0.3 / ascents)
    expected = dense_gradient(model, moved, batches)
    before = copies(model)
    got, _ = step_gradients(Case(method_type, {"rho": 0.3, "ascents": ascents}), model, batches)
    assert_gradients(got, expected)
    assert_parameters(model, before)


def test_several_ascents_over_merged_weights_are_dense_autograd():
    model, batches = make_model(F64), make_batches(2, F64)
    before = copies(model)
    names, weights = ["0.weight", "2.weight"], dict(before)
    for _ in range(3):
        own = {n: v.clone().requires_grad_() for n, v in weights.items()}
        losses = [functional_call(model, own, b).square().mean() for b in batches]
        G = torch.autograd.grad(sum(losses) / 2, [own[n] for n in names])
        weights |= along({n: weights[n] for n in names}, dict(zip(names, G, strict=True)), 0.1)
    own = {n: v.clone().requires_grad_() for n, v in weights.items()}
    losses = [functional_call(model, own, b).square().mean() for b in batches]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    slopes = torch.autograd.grad(sum(losses) / 2, [own[n] for n in trained])
    case = Case(SAM, {"rho": 0.3, "scope": "merged", "ascents": 3})
    got, _ = step_gradients(case, model, batches)
    assert_gradients(got, dict(zip(trained, slopes, strict=True)))
    assert_parameters(model, before)


def test_on_a_sphere_several_ascents_are_one():
    """Where the gradient points the same way all along, K steps of rho / K are one of rho."""

    class Round(Bowl):
        def forward(self, _):
            return self.w.square().sum() / 2

    found = []
    for ascents in (1, 4):
        model = Round()
        method = SAM(model, torch.optim.SGD(model.parameters(), lr=1.0), rho=0.5, ascents=ascents)
        method.step(model, [None])
        found.append(model.w.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


# Schedules


@pytest.mark.parametrize("method_type", [SAM, ASAM, LoRASAM, FMLoRA, EFMLoRA, GSAM, GAM])
def test_a_schedule_is_rho_by_hand(method_type):
    schedule = flatkern.linear_decay(4)
    results = []
    for scheduled in (False, True):
        model = make_model()
        options = {"schedule": schedule} if scheduled else {}
        method = method_type(model, sgd(model), rho=0.3, **options)
        for step in range(5):
            if not scheduled:
                method.rho = 0.3 * max(1 - step / 4, 0.0)
            method.step(loss_fn_of(model), make_batches(2))
        results.append(copies(model))
    assert_parameters(model, results[0])


def test_a_resumed_schedule_goes_on():
    def made():
        model = make_model()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        method = SAM(model, optimizer, rho=0.3, schedule=flatkern.inverse_sqrt())
        return model, optimizer, method

    def train(parts, steps):
        for _ in range(steps):
            parts[2].step(loss_fn_of(parts[0]), make_batches(2))

    whole, first, resumed = made(), made(), made()
    train(whole, 4)
    train(first, 2)
    for part, before in zip(resumed, first, strict=True):
        part.load_state_dict(copy.deepcopy(before.state_dict()))
    assert resumed[2].rho_t == pytest.approx(0.3 / math.sqrt(3))
    train(resumed, 2)
    assert_parameters(resumed[0], copies(whole[0]))


def test_rho_is_saved_and_older_states_are_taken():
    model = make_model()
    method = SAM(model, sgd(model), rho=0.3)
    method.rho = 0.7
    state = method.state_dict()
    other = SAM(model, sgd(model), rho=0.1)
    other.load_state_dict(state)
    assert other.rho == 0.7
    older = SAM(model, sgd(model), rho=0.1)
    older.load_state_dict({"seed": 3, "step": 2})
    assert older.rho == 0.1
    for rho, error in ((-1.0, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="rho"):
            other.load_state_dict({**state, "rho": rho, "step": 9})
        assert other.state_dict() == state


def test_steps_that_are_skipped_do_not_move_the_schedule():
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    method = SAM(model, sgd(model), schedule=flatkern.linear_decay(4), scaler=scaler)
    method.step(lambda batch: loss_fn_of(model)(batch) * torch.inf, make_batches(1))
    assert method.rho_t == 0.05
    method.step(loss_fn_of(model), make_batches(1))
    assert method.rho_t == 0.05 * 0.75


# Transfer to A


def test_transferred_to_a_it_is_the_projection_on_b():
    """s B F = P_B E for E = rho H / ||H||, H = (G P_A + P_B G) / 2 formed in full."""
    model, batches = make_model(F64), make_batches(2, F64)
    before = copies(model)
    seen = []

    def loss_fn(batch):
        seen.append(copies(model))
        return loss_fn_of(model)(batch)

    FMLoRA(model, sgd(model, lr=0.0), rho=0.3, transfer="A").step(loss_fn, batches)
    own = {n: v.clone().requires_grad_() for n, v in before.items()}
    losses = [functional_call(model, own, b).square().mean() for b in batches]
    slopes = dict(zip(own, torch.autograd.grad(sum(losses) / 2, list(own.values())), strict=True))
    for layer in ("0", "2"):
        A, B, s = before[f"{layer}.lora_A"], before[f"{layer}.lora_B"], model[int(layer)].scaling
        G = slopes[f"{layer}.weight"]
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        estimate = (G @ P_A + P_B @ G) / 2
        F = seen[-1][f"{layer}.lora_A"] - A
        expected = P_B @ estimate * 0.3 / estimate.norm()
        torch.testing.assert_close(s * B @ F, expected, rtol=1e-9, atol=1e-11)
        tolerances.assert_same_bits(seen[-1][f"{layer}.lora_B"], B)
        # Of all F with this product the shortest: in the row space of B.
        torch.testing.assert_close(F, torch.linalg.pinv(B) @ B @ F, rtol=1e-8, atol=1e-11)


def test_transferred_to_a_it_does_nothing_at_zero_b():
    model = make_model(F64)
    for layer in (model[0], model[2]):
        layer.lora_B.data.zero_()
    plain, _ = step_gradients(Case(flatkern.methods.LoRA), model, make_batches(2, F64))
    found, _ = step_gradients(Case(FMLoRA, {"transfer": "A"}), model, make_batches(2, F64))
    assert_gradients(found, plain)


WRONG = [
    (GSAM, {"alpha": -0.1}, ValueError),
    (GSAM, {"alpha": "1"}, TypeError),
    (GSAM, {"ascents": 2}, ValueError),
    (FriendlySAM, {"sigma": -1.0}, ValueError),
    (FriendlySAM, {"lam": 1.0}, ValueError),
    (FriendlySAM, {"ascents": 2}, ValueError),
    (GAM, {"alpha": math.nan}, ValueError),
    (GAM, {"delta": 0.0}, ValueError),
    (GAM, {"norm": "per_tensor"}, ValueError),
    (GAM, {"last_only": True}, ValueError),
    (SAM, {"ascents": 0}, ValueError),
    (SAM, {"ascents": 1.5}, TypeError),
    (SAM, {"schedule": 0.5}, TypeError),
    (SAM, {"schedule": "cosine_ramp"}, TypeError),
    (EFMLoRA, {"ascents": 2}, ValueError),
    (FMLoRA, {"transfer": "C"}, ValueError),
]


@pytest.mark.parametrize(("method_type", "option", "error"), WRONG)
def test_options_are_checked(method_type, option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        method_type(model, sgd(model), **option)


def test_a_schedule_that_gives_nonsense_is_told_before_anything_is_written():
    model = make_model()
    before = copies(model)
    method = SAM(model, sgd(model), schedule=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"SAM: schedule\(0\) must be finite and at least 0"):
        method.step(loss_fn_of(model), make_batches(1))
    assert_parameters(model, before)
