"""MeZO: the difference quotient along a regenerated z."""

import math

import pytest
import tolerances
import torch
from method_cases import Case, loss_fn_of, make_batches, make_model, sgd, step_gradients, trainable
from torch import nn

import flatkern
from flatkern.methods import MeZO


def noise_of(model, seed=0, step=0):
    """z of every trainable parameter: adapters have the numbers from 2^31 on."""
    got, number, adapter = {}, 0, 2**31
    for name, p in model.named_parameters():
        is_adapter = "lora" in name
        key = flatkern.NoiseKey(seed, step, 0, adapter if is_adapter else number).to("cpu")
        adapter, number = adapter + is_adapter, number + (not is_adapter)
        if p.requires_grad:
            rows = p.shape[0] if p.dim() else 1
            implementation = "reference" if p.dtype == torch.float64 else "auto"
            with flatkern.backend(implementation):
                got[name] = (
                    flatkern.ops.noise(rows, p.numel() // rows, key).view(p.shape).to(p.dtype)
                )
    return got


def test_on_a_quadratic_it_is_the_slope_along_z():
    # (L(w + mu z) - L(w - mu z)) / 2 mu = z'g for any mu; mu z is rounded to float32.
    model = nn.ParameterDict(
        {
            "w": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double(),
            "b": torch.tensor([0.3, -0.2]).double(),
            "s": torch.tensor(0.7).double(),
        }
    )

    def loss_fn(batch):
        return sum(batch * p.square().sum() + p.sum() for p in model.parameters())

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = MeZO(model, optimizer, mu=0.5, seed=3)
    for step in range(2):
        z = noise_of(model, 3, step)
        clean = {name: p.detach().clone() for name, p in model.named_parameters()}
        slope = sum((z[n] * (2 * 1.5 * p + 1)).sum() for n, p in clean.items())
        loss = method.step(loss_fn, [1.0, 2.0])
        for name, p in model.named_parameters():
            torch.testing.assert_close(clean[name] - p, slope * z[name], rtol=1e-6, atol=1e-9)
        curvature = sum(1.5 * (0.5 * z[n]).square().sum() for n in clean)
        middle = sum(1.5 * p.square().sum() + p.sum() for p in clean.values())
        assert loss == pytest.approx((middle + curvature).item(), rel=1e-6)
    assert not torch.equal(model["s"], before["s"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_model_is_seen_at_both_points(dtype):
    model = make_model(dtype)
    clean = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def loss_fn(batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        assert not torch.is_grad_enabled()
        return loss_fn_of(model)(batch)

    MeZO(model, sgd(model), mu=0.25).step(loss_fn, make_batches(1, dtype))
    for name, z in noise_of(model).items():
        for values, sign in zip(seen, (1, -1), strict=True):
            # Adapters of a bfloat16 model are float32.
            tolerances.assert_same_bits(values[name], clean[name] + sign * 0.25 * z)
    tolerances.assert_same_bits(seen[0]["0.weight"], clean["0.weight"])


def test_the_gradient_is_p_times_z_and_splits():
    model = make_model(torch.float64)
    case = Case(MeZO, {"mu": 1e-3})
    gradients, _ = step_gradients(case, model, make_batches(2, torch.float64))
    slopes = {n: (gradients[n] / z).flatten() for n, z in noise_of(model).items()}
    p = slopes["0.lora_A"][0]
    for slope in slopes.values():
        torch.testing.assert_close(slope, p.expand_as(slope), rtol=1e-12, atol=0)
    for weight in trainable(model):
        weight.grad = None
    sum(loss_fn_of(model)(batch) / 2 for batch in make_batches(2, torch.float64)).backward()
    expected = sum((z * model.get_parameter(n).grad).sum() for n, z in noise_of(model).items())
    # The third derivative enters with mu^2.
    assert p.item() == pytest.approx(expected.item(), rel=1e-3)


def test_dropout_is_off_and_modes_come_back():
    model = nn.Sequential(make_model(), nn.Dropout(0.9))
    model[0][2].eval()
    seen = []

    def loss_fn(batch):
        seen.append(any(module.training for module in model.modules()))
        return loss_fn_of(model)(batch)

    MeZO(model, sgd(model)).step(loss_fn, make_batches(1))
    assert seen == [False, False]
    assert model.training
    assert model[1].training
    assert not model[0][2].training


def test_steps_and_seeds_have_noise_of_their_own():
    results = []
    for seed, skipped in ((0, 0), (0, 0), (0, 1), (1, 0)):
        model = make_model()
        method = MeZO(model, sgd(model), seed=seed)
        method.load_state_dict({"seed": seed, "step": skipped})
        method.step(loss_fn_of(model), make_batches(1))
        results.append(model[0].lora_B.detach())
    tolerances.assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"mu": 0.0}, ValueError),
        ({"mu": -1.0}, ValueError),
        ({"mu": math.nan}, ValueError),
        ({"mu": math.inf}, ValueError),
        ({"mu": "1"}, TypeError),
        ({"seed": -1}, ValueError),
        ({"seed": 1.0}, TypeError),
    ],
    ids=str,
)
def test_options_are_checked(option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        MeZO(model, sgd(model), **option)
