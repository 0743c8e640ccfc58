"""Flatness figures against closed forms on quadratics, and what they promise about their draws."""

import math

import pytest
import torch
from quadratics import Quadratic, bits, made
from scipy import stats
from torch import nn

import flatkern
from flatkern import landscape
from flatkern.landscape._estimate import Estimate, t_quantile
from flatkern.nn import LoRALinear, replace_linear


@pytest.mark.parametrize("slope", [False, True], ids=["stationary", "slope"])
def test_average_is_half_the_trace_of_s_squared_h(slope):
    model = Quadratic(slope=slope)
    # Away from its minimum as well: antithetic pairs cancel every slope.
    model.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    sigma, draws = 0.1, 64
    found = landscape.average_flatness(
        model, model.loss, sigma=sigma, strategy="gaussian", draws=draws
    )
    exact = 0.5 * sigma**2 * float(model.h.sum())
    # The variance of 1/2 S^2 sum h z^2 is 1/2 S^4 sum h^2; five standard deviations of the mean.
    deviation = math.sqrt(0.5 * sigma**4 * float(model.h.square().sum()) / draws)
    assert abs(found - exact) < 5 * deviation
    assert found.standard_error == pytest.approx(deviation, rel=0.4)
    assert found.interval[0] < found < found.interval[1]


@pytest.mark.parametrize("strategy", ["matrix", "element", "row", "flat_lora"])
def test_average_takes_the_scale_of_the_strategy(strategy):
    model, sigma, draws = Quadratic(), 0.2, 60
    model.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    w, n = model.weight.data, model.weight.shape[1]
    deviation = {
        "matrix": w.norm().expand_as(w),
        "element": w.abs(),
        "row": w.norm(dim=1, keepdim=True).expand_as(w),
        "flat_lora": w.norm(dim=1, keepdim=True).expand_as(w) / math.sqrt(n),
    }[strategy]
    weighted = 0.5 * sigma**2 * deviation.square() * model.h
    found = landscape.average_flatness(
        model, model.loss, sigma=sigma, strategy=strategy, draws=draws
    )
    error = math.sqrt(2 * float(weighted.square().sum()) / draws)
    assert abs(found - float(weighted.sum())) < 5 * error


def test_the_worst_cases_of_a_quadratic():
    model = Quadratic()
    found = landscape.worst_flatness(
        model, model.loss, sigma=0.1, strategy="gaussian", draws=8, ascent_steps=400
    )
    # Power iteration stops where a step adds 1e-5.
    exact = 0.5 * found.rho**2 * float(model.h.max())
    assert found.ascent == pytest.approx(exact, rel=5e-3)
    assert found.ascent <= exact * (1 + 1e-9)
    assert found.sampled <= found.ascent
    assert found.sampled == pytest.approx(float(found.losses.max()) - found.plain)
    z = flatkern.ops.noise(5, 30, flatkern.NoiseKey(0, 2**32 - 1, found.draw, 0).to("cpu"))
    assert found.rho == pytest.approx(0.1 * float(z.norm()), rel=1e-6)
    assert (model.weight == 0).all()


def test_one_ascent_step_is_along_the_gradient():
    model = Quadratic(slope=True)
    found = landscape.worst_flatness(
        model, model.loss, strategy="gaussian", draws=1, rho=0.3, ascent_steps=1
    )
    with torch.no_grad():
        model.weight.add_(0.3 * model.g / model.g.norm())
        assert found.ascent == pytest.approx(float(model.loss()), rel=1e-9)


def test_the_same_keys_for_every_model():
    model, loss = made("mlp")
    options = {"sigma": 0.1, "draws": 3, "seed": 5}
    first = landscape.average_flatness(model, loss, **options)
    again = landscape.average_flatness(model, loss, **options)
    assert torch.equal(first.samples, again.samples)
    # More draws add to those there are; another seed has others.
    more = landscape.average_flatness(model, loss, **options | {"draws": 5})
    assert torch.equal(more.samples[:3], first.samples)
    other = landscape.average_flatness(model, loss, **options | {"seed": 6})
    assert not torch.equal(other.samples, first.samples)


def test_merged_weights_are_seen_in_full_space():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    replace_linear(model, "all-linear", r=2, lora_alpha=4)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 6, dtype=torch.float64)
    found = landscape.average_flatness(
        model, lambda: model(x).square().mean(), sigma=0.1, draws=4, seed=2
    )
    merged = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    for i in (0, 2):
        merged[i].weight.data = model[i].merged_weight()
        merged[i].bias.data = model[i].bias.data
    weights = [merged[0].weight, merged[2].weight]
    clean = [weight.data.clone() for weight in weights]
    plain = float(merged(x).square().mean().detach())
    for draw, sample in enumerate(found.samples):
        rises = []
        for sign in (1, -1):
            for number, weight, w in zip((0, 2), weights, clean, strict=True):
                key = flatkern.NoiseKey(2, 2**32 - 1, draw, number).to("cpu")
                c = 0.1 / math.sqrt(w.shape[1]) * w.norm(dim=1, keepdim=True)
                weight.data = w + sign * c * flatkern.ops.noise(*w.shape, key)
            rises.append(float(merged(x).square().mean()) - plain)
        # c is rounded to float32.
        assert float(sample) == pytest.approx(sum(rises) / 2, rel=1e-4)


def test_a_curve_is_the_average_at_every_strength():
    model, loss = made("mlp")
    curve = landscape.radius_curve(model, loss, sigmas=[0.0, 0.05, 0.2], draws=3)
    assert curve.mean[0] == 0
    assert curve.worst[0] == 0
    for sigma, mean, low, high in zip(curve.sigmas, curve.mean, curve.low, curve.high, strict=True):
        if sigma:
            alone = landscape.average_flatness(model, loss, sigma=float(sigma), draws=3)
            assert float(mean) == pytest.approx(float(alone), rel=1e-9)
            assert (float(low), float(high)) == pytest.approx(alone.interval)
    assert (curve.worst[1:] >= curve.mean[1:]).all()


def test_nan_is_a_result():
    model = Quadratic()
    model.weight.data.fill_(1e-3)

    def loss():
        value = model.loss()
        return value if model.weight.min() > 0 else value * math.nan

    found = landscape.average_flatness(model, loss, sigma=1.0, strategy="gaussian", draws=2)
    assert math.isnan(found)
    assert (model.weight == 1e-3).all()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 31, 300])
@pytest.mark.parametrize("p", [0.8, 0.975, 0.9995])
def test_quantiles_of_students_t(p, freedom):
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=2e-3)


def test_intervals_are_students():
    samples = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    found = Estimate(samples, 0.9)
    expected = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(samples.numpy()))
    assert found.interval == pytest.approx(expected, rel=2e-3)
    assert Estimate(samples[:1], 0.9).interval == (-math.inf, math.inf)


BAD = [
    ({"sigma": -1.0}, ValueError, "sigma"),
    ({"sigma": "a"}, TypeError, "sigma"),
    ({"strategy": "fisher"}, ValueError, "strategy"),
    ({"draws": 0}, ValueError, "draws"),
    ({"seed": -1}, ValueError, "seed"),
    ({"scope": "merged"}, ValueError, "scope 'merged'"),
    ({"scope": "here"}, ValueError, "scope"),
    ({"confidence": 1.0}, ValueError, "confidence"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_input(options, kind, message):
    model, loss = made("mlp")
    before = bits(model)
    with pytest.raises(kind, match=message):
        landscape.average_flatness(model, loss, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_or_a_loss_of_the_wrong_kind():
    model, loss = made("mlp")
    with pytest.raises(TypeError, match="model must be Module"):
        landscape.average_flatness("model", loss)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        landscape.average_flatness(model, 3.0)
    with pytest.raises(TypeError, match="loss_fn must return a scalar"):
        landscape.average_flatness(model, lambda: torch.ones(2))
    with pytest.raises(ValueError, match="weights in scope"):
        landscape.average_flatness(nn.ReLU(), lambda: 1.0)


def test_not_inside_a_window_and_not_merged():
    model = nn.Sequential(nn.Linear(4, 4))
    replace_linear(model, "all-linear", r=2)
    noise = flatkern.WeightNoise(model)
    with noise.window(), pytest.raises(RuntimeError, match="window"):
        landscape.average_flatness(model, lambda: 1.0)
    model[0].merge()
    with pytest.raises(RuntimeError, match="merged"):
        landscape.average_flatness(model, lambda: 1.0)
