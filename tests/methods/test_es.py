"""Evolution strategies: exact on quadratics, MeZO's bits for a pair, unbiased."""

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
)
from scipy.stats import rankdata
from torch import nn

import flatkern
from flatkern.methods import ES, MeZO
from flatkern.methods.es import shape

F64 = torch.float64


class Quadratic(nn.Module):
    """L = 1/2 w'H w + b'w with a full H, at a w of 6 elements."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=F64)
        self.H, self.b = root @ root.t(), torch.randn(6, generator=generator, dtype=F64)
        self.w = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=F64))

    def forward(self, _):
        w = self.w.flatten()
        return w @ self.H @ w / 2 + self.b @ w

    def slope(self):
        return (self.H @ self.w.detach().flatten() + self.b).view(2, 3)


def normals(count, seed=0, step=0):
    """z of every draw, flat; the reference's, as float64 weights have it."""
    with flatkern.backend("reference"):
        keys = [flatkern.NoiseKey(seed, step, draw, 0).to("cpu") for draw in range(count)]
        return torch.stack([flatkern.ops.noise(2, 3, key).flatten().double() for key in keys])


def gradient(model, **options):
    got, loss = step_gradients(Case(ES, options), model, [None], loss_fn=model)
    return got["w"], loss


def test_an_antithetic_population_is_exact_on_a_quadratic():
    """g = (1 / pairs) sum z z' grad L for any sigma; sigma z is rounded to float32."""
    model = Quadratic()
    before = model.w.detach().clone()
    z = normals(5, seed=3)
    expected = (z.t() @ (z @ model.slope().flatten()) / 5).view(2, 3)
    found, loss = gradient(model, sigma=0.5, population=10, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    curvature = torch.einsum("ki,ij,kj->k", z, model.H, z).mean() * 0.5**2 / 2
    assert loss == pytest.approx((model(None) + curvature).item(), rel=1e-6)
    tolerances.assert_same_bits(model.w.detach(), before)


def test_a_population_that_is_not_antithetic():
    """g = 1 / (N sigma) sum L(w + sigma z) z, formed from the losses themselves."""
    model = Quadratic()
    w = model.w.detach().clone()
    z = normals(4)
    losses = []
    with torch.no_grad():
        for row in z:
            model.w.copy_(w + (0.5 * row.float()).view(2, 3))
            losses.append(model(None))
        model.w.copy_(w)
    expected = (torch.stack(losses)[:, None] * z).mean(0) / 0.5
    found, loss = gradient(model, sigma=0.5, population=4, antithetic=False)
    torch.testing.assert_close(found, expected.view(2, 3), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_expectation_is_the_gradient_of_the_smoothed_quadratic(antithetic):
    """Which is grad L. Mean over 20 populations, every element within 5 standard errors.

    Six elements, 19 degrees of freedom: a false alarm in 2000 runs of other seeds.
    """
    model = Quadratic()
    options = {"sigma": 0.3, "population": 16, "antithetic": antithetic}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method, seen = ES(model, optimizer, **options), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.w.grad.clone()))
    for _ in range(20):
        method.step(model, [None])
    found = torch.stack(seen)
    error = found.std(0) / 20**0.5
    assert ((found.mean(0) - model.slope()).abs() < 5 * error).all()
    if antithetic:
        # And it says something: the gradient is far larger than its error.
        assert (model.slope().abs() > 5 * error).any()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_a_pair_is_mezo_to_the_bit(dtype):
    results = []
    for kind, options in ((MeZO, {"mu": 0.01}), (ES, {"sigma": 0.01, "population": 2})):
        model = make_model(dtype)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        method = kind(model, optimizer, seed=3, **options)
        losses = [method.step(loss_fn_of(model), make_batches(2, dtype)) for _ in range(3)]
        results.append((losses, copies(model)))
    assert results[0][0] == results[1][0]
    assert_parameters(model, results[0][1])


def test_members_see_the_same_batches_and_a_reward_is_enough():
    """No gradient is asked for: the loss may come out of a table."""
    model = nn.Linear(3, 1, bias=False)
    seen = []

    def loss_fn(batch):
        assert not torch.is_grad_enabled()
        seen.append(batch)
        return -torch.tensor(float(model.weight.sum() > 0))

    method = ES(model, torch.optim.SGD(model.parameters(), lr=0.1), sigma=1.0, population=4)
    method.step(loss_fn, ["one", "two"])
    assert seen == ["one", "two"] * 4


@pytest.mark.parametrize(
    "losses", [[3.0, -1.0, 2.0, 10.0], [1.0, 1.0, 0.0, 2.0, 2.0], [5.0, 5.0], [1.0, math.inf, 0.0]]
)
def test_ranks_are_centred_and_shared(losses):
    expected = (rankdata(losses) - 1) / (len(losses) - 1) - 0.5
    found = shape(torch.tensor(losses, dtype=F64), "ranks")
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert found.sum() == 0


def test_fitness_of_what_is_not_finite():
    losses = torch.tensor([1.0, math.nan, 0.0])
    torch.testing.assert_close(shape(losses, "ranks"), torch.tensor([0.0, 0.5, -0.5]))
    for bad in (math.nan, math.inf):
        for fitness in ("ranks", "zscore"):
            assert shape(torch.full((4,), bad), fitness).isnan().all()
    assert shape(torch.full((4,), 2.0), "zscore").eq(0).all()


def test_zscores_do_not_see_scale_nor_shift():
    losses = torch.tensor([3.0, -1.0, 2.0, 10.0], dtype=F64)
    found = shape(losses, "zscore")
    torch.testing.assert_close(shape(7 * losses + 3, "zscore"), found)
    assert found.std().item() == pytest.approx(1.0)
    assert found.mean().abs() < 1e-15


@pytest.mark.parametrize("fitness", ["ranks", "zscore"])
def test_shaped_fitness_does_not_see_the_loss_s_scale(fitness):
    results = []
    for factor in (1.0, 64.0):
        model = make_model()
        method = ES(model, sgd(model), sigma=0.1, population=6, fitness=fitness)
        method.step(lambda batch, m=model, f=factor: f * loss_fn_of(m)(batch), make_batches(1))
        results.append(copies(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-7)


WRONG = [
    ({"sigma": 0.0}, ValueError),
    ({"sigma": math.nan}, ValueError),
    ({"sigma": "1"}, TypeError),
    ({"population": 3}, ValueError),
    ({"population": 0}, ValueError),
    ({"population": 4.0}, TypeError),
    ({"population": 1, "antithetic": False, "fitness": "ranks"}, ValueError),
    ({"antithetic": 1}, TypeError),
    ({"fitness": "best"}, ValueError),
    ({"seed": -1}, ValueError),
]


@pytest.mark.parametrize(("options", "error"), WRONG)
def test_options_are_checked(options, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(options))):
        ES(model, sgd(model), **options)
