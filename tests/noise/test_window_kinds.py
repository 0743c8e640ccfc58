"""Every kind of adapter in a window: x (W' + e)^T + b, against W' and its gradients in float64.

The noise e is W''s own, sigma / sqrt(n) ||W'_i|| z_ij, whatever the base weight is.
"""

import math

import pytest
import tolerances
import torch
from torch import nn
from torch.nn import functional as F

import flatkern
from flatkern.nn import BDALinear, DoRALinear, NoRALinear, awsvd_init, lora_ga_init, replace_linear

M, N = 14, 20
SIGMA = 0.2
SEED, STEP = 3, 5


def lora(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6)


def rslora(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, use_rslora=True)


def pissa(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, init_lora_weights="pissa")


def lora_ga(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6)
    x = torch.randn(9, N).to(model[0].weight.dtype)
    lora_ga_init(model, lambda scale: (scale * model(x)).float().square().mean(), [1.0, 2.0])


def dora(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, layer=DoRALinear)


def renorm(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, layer=DoRALinear, renorm=True)


def pissa_dora(model):
    options = {"init_lora_weights": "pissa", "layer": DoRALinear}
    replace_linear(model, "all-linear", r=4, lora_alpha=6, **options)


def nora(model):
    replace_linear(model, "all-linear", r=6, lora_alpha=6, layer=NoRALinear, r_inner=2)
    awsvd_init(model, [torch.randn(7, N).to(model[0].weight.dtype)])


def bda(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, layer=BDALinear)


def square(model):
    replace_linear(model, "all-linear", r=4, lora_alpha=6, layer=BDALinear, square=True)


KINDS = [lora, rslora, pissa, lora_ga, dora, renorm, pissa_dora, nora, bda, square]


def make(kind, dtype):
    """One layer whose adapters have been trained, as far as they are."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(N, M)).to(dtype)
    kind(model)
    layer = model[0]
    with torch.no_grad():
        for value in layer.adapters().values():
            if value.requires_grad:
                value += 0.2 * torch.randn_like(value)
        if isinstance(layer, DoRALinear):
            layer.lora_magnitude[3] *= -1
    return model


def leaves(layer):
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in layer.adapters().items()
    }


def low_rank(layer, own):
    """W' of the kind without DoRA's scale, minus W."""
    if isinstance(layer, NoRALinear):
        return layer.scaling * own["lora_B"] @ own["nora_B"] @ own["nora_A"] @ own["lora_A"]
    if isinstance(layer, BDALinear):
        inner = own["lora_D"] if layer.square else own["lora_D"].diag()
        return layer.scaling * own["lora_B"] @ inner @ own["lora_A"]
    return layer.scaling * own["lora_B"] @ own["lora_A"]


def dense(layer, own, noise=0.0):
    """W' + e in float64, differentiable; `noise` is the base weight's."""
    weight = layer.weight.detach().double()
    clean = weight + low_rank(layer, own)
    if not isinstance(layer, DoRALinear):
        return clean + noise
    denominator = (clean + noise if layer.renorm else clean).norm(dim=1).detach()
    return (own["lora_magnitude"] / denominator)[:, None] * (clean + noise)


def base_norm(layer, own):
    """Norms of V (of W', where there is no DoRA), and what their rounding is relative to."""
    weight, delta = layer.weight.detach().double(), low_rank(layer, own).detach()
    return (weight + delta).norm(dim=1), (weight.abs() + delta.abs()).norm(dim=1)


def written_noise(layer, row_scale):
    """What the base weight's noise comes to after its rounding to the weight's dtype."""
    weight = layer.weight.detach()
    key = flatkern.NoiseKey(SEED, STEP)
    noisy = flatkern.ops.perturb(weight, row_scale, key.to(weight.device))
    return noisy.double() - weight.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weight(kind, dtype):
    layer = make(kind, dtype)[0]
    exact = dense(layer, leaves(layer)).detach()
    # A few float32 roundings of the terms, and one to the weight's dtype.
    size = low_rank(layer, leaves(layer)).detach().abs() + layer.weight.double().abs()
    bound = 16 * tolerances.ulp(size, torch.float32) + tolerances.ulp(exact, dtype) / 2
    if isinstance(layer, DoRALinear):
        ratio = layer.lora_magnitude.double().abs() / base_norm(layer, leaves(layer))[0]
        bound = 16 * tolerances.ulp(size * ratio[:, None], torch.float32)
        bound = bound + tolerances.ulp(exact, dtype) / 2
    tolerances.assert_within(layer.merged_weight(), exact, bound)
    clean = layer.weight.detach().clone()
    x = torch.randn(5, N).to(dtype)
    expected = F.linear(x, layer.merged_weight(), layer.bias)
    layer.merge()
    tolerances.assert_same_bits(layer(x), expected)
    layer.unmerge()
    tolerances.assert_same_bits(layer.weight, clean)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_window(kind, dtype, mode):
    model = make(kind, dtype)
    layer = model[0]
    own = leaves(layer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(8, N).to(dtype)
    noise = flatkern.WeightNoise(model, SIGMA, mode=mode, seed=SEED)

    wide_x = x.double().clone().requires_grad_()
    x = x.clone().requires_grad_()
    with noise.window(step=STEP):
        c = layer._window.row_scale.clone()
        y = layer(x)
        tolerances.assert_same_bits(layer.merged_weight(), make(kind, dtype)[0].merged_weight())
        with noise.paused():
            paused = layer(x)
        if mode == "virtual":
            y.double().square().sum().backward()
    if mode == "inplace":
        # A pause writes the weight, so that the graph from before it cannot be used.
        with noise.window(step=STEP):
            again = layer(x)
            tolerances.assert_same_bits(again, y)
            again.double().square().sum().backward()
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])
    tolerances.assert_same_bits(layer(x), paused)

    norm, size = base_norm(layer, own)
    bound = SIGMA / math.sqrt(N) * tolerances.row_norm_bound(size, 6)
    # Rounding of sigma / sqrt(n) times the norm.
    tolerances.assert_within(c, SIGMA / math.sqrt(N) * norm, bound + 2 * tolerances.ulp(c, c.dtype))
    expected = F.linear(wide_x, dense(layer, own, written_noise(layer, c)), layer.bias.double())
    expected.square().sum().backward()
    got = {name: value.grad for name, value in layer.adapters().items() if value.requires_grad}
    # Products of a few dozen terms: 100 roundings; DoRA's norms are float32 in a float64 layer too.
    # In bfloat16 a few roundings of the output and of its gradient.
    wide = dtype == torch.float64 and not isinstance(layer, DoRALinear)
    relative = 8 * 2.0**-8 if dtype == torch.bfloat16 else 100 * 2.0 ** (-53 if wide else -24)
    tolerances.assert_within(y, expected, relative * expected.abs().max())
    tolerances.assert_within(x.grad, wide_x.grad, relative * wide_x.grad.abs().max())
    assert got.keys() == {name for name, value in own.items() if value.requires_grad}
    for name, gradient in got.items():
        exact = own[name].grad
        tolerances.assert_within(gradient, exact, relative * exact.abs().max())


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_descends_and_leaves_the_frozen_weights(kind, mode):
    torch.manual_seed(2)
    x, target = torch.randn(64, N), torch.randn(64, M)
    model = make(kind, torch.bfloat16)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    method = flatkern.methods.FlatLoRA(model, torch.optim.Adam(trained, 1e-2), mode=mode)

    def loss_fn(part):
        return F.mse_loss(model(x[part].bfloat16()).float(), target[part])

    losses = [method.step(loss_fn, [slice(0, 32), slice(32, 64)]) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, before) for p, before in zip(trained, start, strict=True))
    for name, value in frozen.items():
        tolerances.assert_same_bits(model.get_parameter(name), value)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_noise_on_a_dora_weight_is_of_the_magnitudes(mode):
    # W'_i + e_i with e_ij = sigma / sqrt(n) |mu_i| z_ij, whatever V is.
    model = make(dora, torch.float32)
    layer = model[0]
    clean = dense(layer, leaves(layer)).detach()
    with flatkern.WeightNoise(model, SIGMA, mode=mode, seed=SEED).window(step=STEP):
        seen = (layer(torch.eye(N)) - layer.bias).t()
    z = flatkern.ops.noise(M, N, flatkern.NoiseKey(SEED, STEP).to("cpu"))
    mu = layer.lora_magnitude.detach()
    expected = clean + (SIGMA / math.sqrt(N) * mu)[:, None] * z
    tolerances.assert_within(seen, expected, 2e-6 * expected.abs().max())


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_renorm_keeps_the_length_of_noisy_rows(mode, monkeypatch):
    # In panels of two rows.
    monkeypatch.setattr("flatkern.nn.dora._SCRATCH_BYTES", 2 * 4 * N)
    model = make(renorm, torch.float32)
    layer = model[0]
    with flatkern.WeightNoise(model, SIGMA, mode=mode).window():
        seen = (layer(torch.eye(N)) - layer.bias).t()
    mu = layer.lora_magnitude.detach().abs()
    tolerances.assert_within(seen.norm(dim=1), mu.double(), 1e-5 * mu.double())
    noisy = dense(layer, leaves(layer)).float()
    assert (seen - noisy).norm() > 0.5 * SIGMA * noisy.norm()


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("kind", [dora, renorm, nora])
def test_a_late_backward_raises(kind, mode):
    model = make(kind, torch.float32)
    noise = flatkern.WeightNoise(model, SIGMA, mode=mode)
    with noise.window():
        loss = model(torch.randn(3, N)).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_do_not_change_tensor_numbers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), nn.Linear(M, M), nn.LayerNorm(M))
    plain = [name for name, _ in model.named_parameters()]
    if kind is lora_ga:
        replace_linear(model, "all-linear", r=4)
    elif kind is nora:
        replace_linear(model, "all-linear", r=4, layer=NoRALinear)
    else:
        kind(model)
    targets = flatkern.WeightNoise(model)._targets
    assert {target.name: target.number for target in targets} == {
        name: plain.index(name) for name in ("0.weight", "1.weight")
    }


@pytest.mark.parametrize("kind", [dora, nora])
def test_autocast_does_not_change_the_scale(kind):
    model = make(kind, torch.float32)
    noise = flatkern.WeightNoise(model, SIGMA)
    with noise.window(step=STEP):
        c = model[0]._window.row_scale.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16), noise.window(step=STEP):
        tolerances.assert_same_bits(model[0]._window.row_scale, c)
        assert model(torch.randn(2, N)).dtype == torch.bfloat16


def test_first_window_in_inference_mode():
    model = make(dora, torch.float32)
    noise = flatkern.WeightNoise(model, SIGMA)
    with torch.inference_mode(), noise.window():
        model(torch.randn(2, N))
    with noise.window():
        model(torch.randn(2, N)).sum().backward()
    assert model[0].lora_magnitude.grad.abs().max() > 0
