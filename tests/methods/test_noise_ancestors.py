"""NoisyTune, SmoothOut, GMP and Entropy-SGD against closed forms, limits and the op `uniform`."""

import copy
import math

import oracle
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
from flatkern.methods import GMP, RWP, EntropySGD, LoRA, MixedRWP, NoisyTune, SmoothOut

F64 = torch.float64


class Quadratic(nn.Module):
    """L = 1/2 sum h_ij w_ij^2 + the batch times sum w_ij."""

    def __init__(self, shape=(5, 7), dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
        self.h = torch.rand(shape, generator=generator, dtype=F64) + 0.5

    def forward(self, batch):
        return (self.h * self.w.square()).sum() / 2 + batch * self.w.sum()


def gradient_of(method_type, model, batches=(0.0,), **options):
    """What the optimizer sees in one step."""
    got, loss = step_gradients(Case(method_type, options), model, list(batches), loss_fn=model)
    return got["w"], loss


def uniform(shape, seed=0, step=0, tensor=0):
    """From the words of an independent Philox, in float64."""
    rows = shape[0] if shape else 1
    words = oracle.words(rows, math.prod(shape) // rows, (seed, step, 0, tensor))
    return torch.from_numpy((words >> 8).astype("float64") * 2.0**-23 + 2.0**-24 - 1).view(shape)


# SmoothOut


def test_smooth_out_on_a_quadratic():
    """g = H (w + sqrt(3) sigma u), with u known; e is rounded to float32."""
    model = Quadratic()
    w = model.w.detach().clone()
    e = 3**0.5 * 0.3 * uniform((5, 7), seed=4)
    g, loss = gradient_of(SmoothOut, model, sigma=0.3, seed=4)
    torch.testing.assert_close(g, model.h * (w + e), rtol=1e-6, atol=1e-7)
    assert loss == pytest.approx(((model.h * (w + e).square()).sum() / 2).item(), rel=1e-6)
    tolerances.assert_same_bits(model.w.detach(), w)


def test_smooth_out_smooths_by_half_the_trace():
    """E L(w + e) = L + 1/2 sigma^2 tr H; 400 draws, a false alarm in 1e5 runs (4.4 deviations)."""
    model = Quadratic()
    method = SmoothOut(model, torch.optim.SGD(model.parameters(), lr=0.0), sigma=0.3)
    with torch.no_grad():
        clean = model(0.0).item()
    losses = torch.tensor([method.step(model, [0.0]) for _ in range(400)], dtype=F64)
    expected = clean + 0.5 * 0.09 * model.h.sum().item()
    assert abs(losses.mean() - expected) < 4.4 * losses.std() / 20


@pytest.mark.parametrize("strategy", ["row", "flat_lora", "matrix"])
def test_smooth_out_by_rows(strategy):
    model = Quadratic()
    w = model.w.detach().clone()
    norms = {
        "row": w.norm(dim=1, keepdim=True),
        "flat_lora": w.norm(dim=1, keepdim=True) / 7**0.5,
        "matrix": w.norm(),
    }
    e = 3**0.5 * 0.3 * norms[strategy] * uniform((5, 7))
    g, _ = gradient_of(SmoothOut, model, sigma=0.3, strategy=strategy)
    torch.testing.assert_close(g, model.h * (w + e), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_uniform_noise_is_rounded_once(dtype):
    """fl(w + fl32(c u)), and what would overflow stays."""
    model = Quadratic(dtype=dtype)
    large = torch.finfo(dtype).max
    with torch.no_grad():
        model.w[0, 0] = large
    w = model.w.detach().clone()
    seen = []

    def loss_fn(_):
        seen.append(model.w.detach().clone())
        return model.w.float().sum() * 0

    SmoothOut(model, torch.optim.SGD(model.parameters(), lr=0.0), sigma=1e3).step(loss_fn, [None])
    e = (uniform((5, 7)).float() * torch.tensor(3**0.5 * 1e3)).to(torch.float32)
    expected = (w + e).to(dtype)
    expected = torch.where(expected.isfinite(), expected, w)
    tolerances.assert_same_bits(seen[0], expected)
    assert not torch.equal(seen[0], w)


def test_panels_do_not_show(monkeypatch):
    found = []
    for panel in (2**20, 3):
        monkeypatch.setattr("flatkern.methods._seeded._PANEL", panel)
        model = make_model()
        SmoothOut(model, sgd(model), sigma=0.1).step(loss_fn_of(model), make_batches(1))
        found.append(copies(model))
    assert_parameters(model, found[0])


# NoisyTune


def test_noisy_tune_is_plain_training_from_the_noisy_weights():
    model, plain = make_model(F64), make_model(F64)
    before = copies(model)
    adapters = [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for index, name in enumerate(adapters):
            p = plain.get_parameter(name)
            e = 0.25 * p.std() * uniform(tuple(p.shape), seed=5, tensor=2**31 + index)
            p.add_(e.to(torch.float32))
    method = NoisyTune(model, sgd(model, lr=1e-3), lam=0.5, seed=5)
    assert_parameters(model, before)
    lora = LoRA(plain, sgd(plain, lr=1e-3))
    for count in (2, 1, 3):
        batches = make_batches(count, F64)
        loss = method.step(loss_fn_of(model), batches)
        assert loss == pytest.approx(lora.step(loss_fn_of(plain), batches), rel=1e-6)
    for name in adapters:
        found, expected = model.get_parameter(name), plain.get_parameter(name)
        # e is rounded to float32, and three steps make more of it.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_noisy_tune_has_the_deviation_of_its_source():
    """U(-lam / 2, lam / 2) std(w) has the standard deviation lam std(w) / sqrt(12).

    1e4 elements: the sample's differs by 0.45 % a deviation; 3 % is more than 6.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(100, 100, bias=False)
    model.weight.data = 0.7 * torch.randn(100, 100, generator=generator)
    before = model.weight.detach().clone()
    method = NoisyTune(model, torch.optim.SGD(model.parameters(), lr=0.0), lam=0.3)
    method.step(lambda _: model.weight.sum() * 0, [None])
    e = model.weight.detach() - before
    assert e.std().item() == pytest.approx(0.3 * before.std().item() / 12**0.5, rel=0.03)
    assert e.abs().max() <= 0.15 * before.std() * (1 + 1e-6)
    after = model.weight.detach().clone()
    method.step(lambda _: model.weight.sum() * 0, [None])
    tolerances.assert_same_bits(model.weight.detach(), after)


def test_noisy_tune_waits_for_a_step_that_updates(monkeypatch):
    model = make_model()
    before = copies(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    method = NoisyTune(model, sgd(model), lam=0.5, scaler=scaler)
    method.step(lambda batch: loss_fn_of(model)(batch) * torch.inf, make_batches(1))
    assert_parameters(model, before)
    assert not method.state_dict()["applied"]
    # A trainer that gives a step up between its gradient and its update.
    method.gradient(loss_fn_of(model), make_batches(1))
    noisy = copies(model)
    method.optimizer.zero_grad()
    method.gradient(loss_fn_of(model), make_batches(1))
    assert_parameters(model, noisy)
    assert not torch.equal(noisy["0.lora_A"], before["0.lora_A"])


def test_noisy_tune_of_a_single_element():
    model = nn.ParameterDict({"w": torch.tensor(2.0), "v": torch.ones(1)})
    method = NoisyTune(model, torch.optim.SGD(model.parameters(), lr=0.0))
    method.step(lambda _: model["w"] * 0 + model["v"].sum() * 0, [None])
    assert model["w"].item() == 2.0
    assert model["v"].item() == 1.0


# GMP


def test_gmp_on_a_quadratic():
    """g = H (w + lam mean_k e_k), with e_k the normals of draw k."""
    model = Quadratic()
    w = model.w.detach().clone()
    keys = [flatkern.NoiseKey(3, 0, draw, 0).to("cpu") for draw in range(4)]
    with flatkern.backend("reference"):
        mean = sum(flatkern.ops.noise(5, 7, key).double() for key in keys) / 4
    g, _ = gradient_of(GMP, model, sigma=0.2, lam=0.7, draws=4, seed=3)
    torch.testing.assert_close(g, model.h * (w + 0.7 * 0.2 * mean), rtol=1e-6, atol=1e-8)
    tolerances.assert_same_bits(model.w.detach(), w)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_gmp_with_one_draw_is_rwp_and_mixed_rwp(mode):
    pairs = [
        (GMP, {"draws": 1, "lam": 1.0, "sigma": 0.1}, RWP, {"sigma": 0.1}),
        (
            GMP,
            {"draws": 1, "lam": 0.25, "sigma": 0.1},
            MixedRWP,
            {"lam": 0.25, "sigma": 0.1, "strategy": "gaussian"},
        ),
    ]
    for first, options, second, others in pairs:
        results = []
        for kind, own in ((first, options), (second, others)):
            model = make_model()
            method = kind(model, sgd(model), mode=mode, **own)
            # One batch serves both of MixedRWP's halves.
            losses = [method.step(loss_fn_of(model), make_batches(1)) for _ in range(3)]
            results.append((losses, copies(model)))
        assert results[0][0] == results[1][0]
        assert_parameters(model, results[0][1])


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.5])
def test_gmp_counts_a_step_once(lam):
    model = nn.Sequential(make_model(), nn.BatchNorm1d(3))
    method = GMP(model, sgd(model), lam=lam, draws=3)
    for _ in range(2):
        method.step(loss_fn_of(model), make_batches(2))
    assert method.noise.step == 2
    assert model[1].num_batches_tracked == 4


# Weights of their own for RWP's two gradients


@pytest.mark.parametrize("split", ["halves", "last"])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.0, 0.3), (0.0, 2.0), (1.0, 0.0)])
def test_mixed_rwp_with_two_weights_is_its_two_parts(split, a, b):
    batches = make_batches(4, F64)
    options = {"sigma": 0.1, "strategy": "row", "seed": 3}
    own = {"a": a, "b": b, "split": split, **options}
    clean_batches, noisy_batches = (
        (batches[:2], batches[2:]) if split == "halves" else (batches, batches[-1:])
    )
    clean, clean_loss = step_gradients(Case(LoRA), make_model(F64), clean_batches)
    rough, rough_loss = step_gradients(Case(RWP, options), make_model(F64), noisy_batches)
    mixed, loss = step_gradients(Case(MixedRWP, own), make_model(F64), batches)
    for name, value in mixed.items():
        expected = a * clean[name] + b * rough[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert loss == pytest.approx(a * clean_loss + b * rough_loss, rel=1e-12)


def test_equal_weights_are_lam_s_bits():
    results = []
    for own in ({"lam": 0.25}, {"a": 0.75, "b": 0.25}):
        model = make_model()
        method = MixedRWP(model, sgd(model), sigma=0.1, **own)
        for _ in range(2):
            method.step(loss_fn_of(model), make_batches(3))
        results.append(copies(model))
    assert_parameters(model, results[0])


# Entropy-SGD


def walk(model, K, r, alpha, gamma, noise):
    """gamma (w - m) by the recursion, with the normals of step k in `noise`."""
    w = model.w.detach().clone()
    v, m = w, w
    for k in range(K):
        v = v - r * (model.h * v + gamma * (v - w)) + noise[k]
        m = (1 - alpha) * m + alpha * v
    return gamma * (w - m)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_entropy_sgd_follows_its_recursion(sigma):
    model = Quadratic()
    w = model.w.detach().clone()
    noise = []
    for k in range(6):
        key = flatkern.NoiseKey(2, 0, 2 * k, 0).to("cpu")
        noise.append(0.1**0.5 * sigma * flatkern.ops.noise(5, 7, key).double())
    options = {"inner_steps": 6, "inner_lr": 0.1, "alpha": 0.75, "gamma": 0.3}
    g, _ = gradient_of(EntropySGD, model, sigma=sigma, seed=2, **options)
    expected = walk(model, 6, 0.1, 0.75, 0.3, noise)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-13)
    tolerances.assert_same_bits(model.w.detach(), w)


def test_entropy_sgd_of_one_step_is_sgd():
    """K = 1 without noise: gamma alpha r times the plain gradient, here 1 times."""
    batches = make_batches(3, F64)
    plain, loss = step_gradients(Case(LoRA), make_model(F64), batches)
    options = {"inner_steps": 1, "inner_lr": 0.5, "alpha": 0.5, "gamma": 4.0, "sigma": 0.0}
    found, own = step_gradients(Case(EntropySGD, options), make_model(F64), batches)
    assert own == loss
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_a_long_walk_without_noise_ends_at_the_proximal_point():
    """v -> argmin L + gamma / 2 |v - w|^2, so g -> the gradient of the Moreau envelope."""
    model = Quadratic()
    w = model.w.detach()
    options = {"inner_steps": 400, "inner_lr": 0.3, "alpha": 0.5, "gamma": 0.8, "sigma": 0.0}
    g, _ = gradient_of(EntropySGD, model, **options)
    expected = model.h * (0.8 * w / (model.h + 0.8))
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def test_entropy_sgd_scopes_by_its_schedule():
    model = Quadratic()
    fixed, _ = gradient_of(EntropySGD, model, gamma=0.6, inner_steps=3)
    scoped, _ = gradient_of(
        EntropySGD, model, gamma=0.3, inner_steps=3, schedule=lambda step: 2.0 + step
    )
    torch.testing.assert_close(fixed, scoped, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SmoothOut", "EntropySGD", "NoisyTune"])
def test_seeds_and_steps_have_noise_of_their_own(name):
    kind = getattr(flatkern.methods, name)
    results = []
    for seed, skipped in ((0, 0), (0, 0), (0, 1), (1, 0)):
        model = make_model()
        method = kind(model, sgd(model), seed=seed)
        method.load_state_dict({**method.state_dict(), "step": skipped})
        method.step(loss_fn_of(model), make_batches(1))
        results.append(model[0].lora_B.detach())
    tolerances.assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_complex_and_small_weights():
    model = nn.ParameterDict(
        {
            "z": torch.tensor([[1 + 2j, 3 - 1j]], dtype=torch.complex128),
            "s": torch.tensor(0.7, dtype=F64),
            "none": torch.empty(0, 3, dtype=F64),
        }
    )

    def loss_fn(_):
        return sum(p.abs().square().sum() for p in model.parameters())

    for kind in (SmoothOut, NoisyTune, EntropySGD):
        method = kind(model, torch.optim.SGD(model.parameters(), lr=0.01))
        before = copy.deepcopy(dict(model.items()))
        method.step(loss_fn, [None])
        assert all(p.isfinite().all() for p in model.parameters())
        assert not torch.equal(model["z"].detach(), before["z"].detach())
        assert not torch.equal(model["z"].detach().imag, before["z"].detach().imag)


WRONG = [
    (SmoothOut, {"sigma": -1.0}, ValueError),
    (SmoothOut, {"strategy": "element"}, ValueError),
    (SmoothOut, {"schedule": 1.0}, TypeError),
    (SmoothOut, {"seed": -1}, ValueError),
    (NoisyTune, {"lam": math.inf}, ValueError),
    (NoisyTune, {"lam": "1"}, TypeError),
    (GMP, {"lam": 1.1}, ValueError),
    (GMP, {"draws": 0}, ValueError),
    (GMP, {"draws": 2.0}, TypeError),
    (MixedRWP, {"a": 1.0}, ValueError),
    (MixedRWP, {"lam": 0.5, "a": 0.5, "b": 0.5}, ValueError),
    (MixedRWP, {"b": -1.0, "a": 1.0}, ValueError),
    (MixedRWP, {"b": 0.0, "a": 0.0}, ValueError),
    (MixedRWP, {"a": "1", "b": 0.0}, TypeError),
    (EntropySGD, {"gamma": 0.0}, ValueError),
    (EntropySGD, {"inner_steps": 0}, ValueError),
    (EntropySGD, {"inner_steps": True}, TypeError),
    (EntropySGD, {"inner_lr": -0.1}, ValueError),
    (EntropySGD, {"alpha": 0.0}, ValueError),
    (EntropySGD, {"sigma": math.nan}, ValueError),
]


@pytest.mark.parametrize(("method_type", "option", "error"), WRONG)
def test_options_are_checked(method_type, option, error):
    model = make_model()
    before = copies(model)
    with pytest.raises(error, match=next(iter(option))):
        method_type(model, sgd(model), **option)
    assert_parameters(model, before)
    assert len(trainable(model)) == 4
