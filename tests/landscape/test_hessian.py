"""Eigenvalue and trace against Hessians that are known, or small enough to be made."""

import pytest
import torch
from quadratics import Quadratic, bits, made
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern import landscape
from flatkern.nn import LoRALinear, replace_linear


def dense(model, loss, parameters):
    """The Hessian, column by column."""
    model.eval()
    flags = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    value, parameters, retain_graph=True, materialize_grads=True
                )
            ]
        )
        for value in flat
    ]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    return torch.stack(rows)


def test_diagonals():
    """The oracle: H = diag(1 .. d)."""
    model = Quadratic(rows=4, cols=25)
    model.h = torch.arange(1.0, 101.0, dtype=torch.float64).view(4, 25)
    top = landscape.hessian_top_eigenvalue(model, model.loss)
    assert top == pytest.approx(100.0, rel=0.01)
    assert top.converged
    assert top.residual <= 0.01 * top
    sharp = landscape.hessian_top_eigenvalue(model, model.loss, tolerance=1e-6)
    assert sharp == pytest.approx(100.0, rel=1e-9)
    # v_i^2 = 1: exact where H is diagonal.
    trace = landscape.hessian_trace(model, model.loss, probes=2)
    assert trace == pytest.approx(5050.0, rel=1e-12)
    assert (model.weight == 0).all()
    assert model.weight.grad is None


@pytest.mark.parametrize("name", ["mlp", "own", "attention", "reader"])
def test_small_networks(name):
    model, loss = made(name, torch.float64)
    before, modes = bits(model), [m.training for m in model.modules()]
    top = landscape.hessian_top_eigenvalue(model, loss, seed=4)
    trace = landscape.hessian_trace(model, loss, probes=60, seed=4)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    exact = dense(model, loss, list(model.parameters()))
    assert top == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=0.01)
    # The variance of v^T H v is twice the squares off the diagonal; five deviations of the mean.
    off = exact - exact.diag().diag()
    deviation = float((2 * off.square().sum() / 60).sqrt())
    assert abs(trace - float(exact.trace())) < 5 * deviation
    assert trace.standard_error == pytest.approx(deviation, rel=0.5)


def test_merged_weights_are_frozen_and_still_differentiated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    replace_linear(model, "all-linear", r=2)
    x = torch.randn(8, 5, dtype=torch.float64)

    def loss():
        return model(x).square().mean()

    weights = [m.weight for m in model.modules() if isinstance(m, LoRALinear)]
    top = landscape.hessian_top_eigenvalue(model, loss)
    assert not any(weight.requires_grad for weight in weights)
    exact = dense(model, loss, weights)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=0.01)


def test_attention_takes_the_kernel_that_has_second_derivatives():
    q = nn.Linear(8, 8)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))

    def loss():
        out = nn.functional.scaled_dot_product_attention(q(x), x, x)
        return out.square().mean()

    exact = dense_in_float64(q, x)
    trace = landscape.hessian_trace(q, loss, probes=60)
    assert abs(trace - exact) < 5 * trace.standard_error < 5 * abs(exact)


def dense_in_float64(q, x):
    double = nn.Linear(8, 8).double()
    double.load_state_dict(q.state_dict())
    x = x.double()

    def loss():
        scores = (double(x) @ x.mT / 8**0.5).softmax(-1)
        return (scores @ x).square().mean()

    return float(dense(double, loss, list(double.parameters())).trace())


def test_a_linear_loss_and_a_loss_without_gradients():
    model, loss = made("mlp")
    linear = nn.Linear(3, 2)
    assert landscape.hessian_top_eigenvalue(linear, lambda: linear(torch.ones(3)).sum()) == 0
    assert landscape.hessian_trace(linear, lambda: linear(torch.ones(3)).sum(), probes=1) == 0
    for bad in (lambda: loss().detach(), lambda: 1.0):
        with pytest.raises(ValueError, match="loss_fn must return a loss that depends"):
            landscape.hessian_top_eigenvalue(model, bad)
        with pytest.raises(ValueError, match="loss_fn must return a loss that depends"):
            landscape.worst_flatness(model, bad, draws=1)
    assert all(p.requires_grad for p in model.parameters())


def test_too_few_steps_are_said():
    model = Quadratic()
    found = landscape.hessian_top_eigenvalue(model, model.loss, max_steps=2, tolerance=1e-9)
    assert not found.converged
    assert found.steps == 2
    assert found <= float(model.h.max())


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (landscape.hessian_top_eigenvalue, {"tolerance": 0.0}, "tolerance"),
        (landscape.hessian_top_eigenvalue, {"max_steps": 0}, "max_steps"),
        (landscape.hessian_trace, {"probes": 0}, "probes"),
        (landscape.hessian_trace, {"confidence": 0.0}, "confidence"),
    ],
    ids=["tolerance", "max_steps", "probes", "confidence"],
)
def test_bad_input(function, options, message):
    model, loss = made("mlp")
    with pytest.raises(ValueError, match=message):
        function(model, loss, **options)
