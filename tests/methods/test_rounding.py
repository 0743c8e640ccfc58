"""Steps below the resolution of 16-bit weights."""

import warnings

import pytest
import tolerances
import torch
from method_cases import Case, cases, copies, loss_fn_of, make_batches, make_model, sgd, trainable
from torch import nn

from flatkern import methods
from flatkern.methods._rounding import rounded_at_random
from flatkern.noise import NoiseKey

STEP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_the_mean_over_all_words_is_the_value(dtype):
    tiny = torch.finfo(dtype).tiny
    values = [0.0, 1.0, 1.3, -1.3, 0.9999, -0.9999, 2.0 - 1e-4, 3.1e-3, -65000.0]
    # Between subnormal numbers, and between 0 and the smallest of them.
    values += [tiny * f for f in (0.73, -0.11, STEP[dtype] * 0.3, -STEP[dtype] * 0.7)]
    value = torch.tensor(values)[:, None].expand(-1, 4096)
    words = (torch.arange(4096) * 2**20).expand_as(value)
    found = rounded_at_random(value, words, dtype)
    assert found.dtype == dtype
    # A share is met within one of the 4096 words.
    bound = tolerances.ulp(value[:, 0], dtype) / 4096
    assert ((found.double().mean(1) - value[:, 0].double()).abs() <= bound).all()
    # One of two neighbours; what is exact stays.
    assert all(row.unique().numel() <= 2 for row in found)
    assert (found[:2] == value[:2]).all()


@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_what_no_neighbour_has(dtype):
    largest = torch.finfo(dtype).max
    value = torch.tensor([torch.inf, -torch.inf, torch.nan, largest, -largest])
    for word in (0, 2**32 - 1):
        found = rounded_at_random(value, torch.full((5,), word), dtype)
        tolerances.assert_same_bits(found, value.to(dtype))


class Line(nn.Module):
    """g_ij the same at every point; a vector and a number beside the matrix."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype) / 30)
        self.b = nn.Parameter(torch.randn(7, generator=generator).to(dtype) / 30)
        self.s = nn.Parameter(torch.tensor(0.3).to(dtype))
        self.slopes = [torch.randn(p.shape, generator=generator).to(dtype) for p in self.parts()]

    def parts(self):
        return [self.w, self.b, self.s]

    def forward(self, batch):
        return sum((p * g).float().sum() for p, g in zip(self.parts(), self.slopes, strict=True))


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (methods.SAM, torch.bfloat16),
        (methods.SAM, torch.float16),
        (methods.ASAM, torch.bfloat16),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rounded at random")
def test_the_ascent_is_right_on_average(kind, dtype):
    model, draws = Line(dtype), 150
    before, rho = flat(model.parts()), STEP[dtype] / 4
    g, T = flat(model.slopes), torch.ones_like(before)
    if kind is methods.ASAM:
        T[:1200] = before[:1200].abs() + 0.01
    step = rho * T * T * g / (T * g).norm()
    # Far below what the weights resolve.
    assert (step.abs() / tolerances.ulp(before, dtype)).median() < 0.9
    total = torch.zeros_like(before)
    for seed in range(draws):
        seen = []

        def loss_fn(batch, seen=seen):
            seen.append(flat(model.parts()))
            return model(batch)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        kind(model, optimizer, rho=rho, seed=seed).step(loss_fn, [None])
        total += seen[1] - before
        assert torch.equal(flat(model.parts()), before)
    # The variance of a rounding is at most ulp^2 / 4; near a power of 2 an ulp may be twice that.
    error = (total / draws - step) / (tolerances.ulp(before, dtype) / draws**0.5)
    assert error.abs().max() < tolerances.Z_SCORE
    assert abs(error.sum() / error.numel() ** 0.5) < tolerances.Z_SCORE


def in_16_bits():
    """Adapters, too, whose steps are all small."""
    model = make_model().to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    return model


ADAPTED = [
    Case(methods.LoRASAM, {"rho": 1e-3}),
    Case(methods.FMLoRA, {"rho": 1e-2}),
    Case(methods.EFMLoRA, {"rho": 1e-2}),
]


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_adapters_in_16_bits(case):
    points = []
    for seed in (0, 0, 1):
        model = in_16_bits()
        before, seen = copies(model), []

        def loss_fn(batch, model=model, seen=seen):
            seen.append(copies(model))
            return loss_fn_of(model)(batch)

        method = case(model, sgd(model, lr=0.0), seed=seed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                method.step(loss_fn, make_batches(1, torch.bfloat16))
        (warning,) = told
        assert "rounded at random, right on average, moves" in str(warning.message)
        points.append(seen[-1])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    one, again, other = (flat(point.values()) for point in points)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("variant", ["nBAR", "oBAR"])
def test_bar_in_16_bits_is_right_on_average(variant):
    # 1 + 1e-4 is 1 in bfloat16.
    model = in_16_bits()
    before = copies(model)
    method = methods.BAR(model, sgd(model, lr=1e-4), alpha=1.0, variant=variant)
    total, draws = 0.0, 400
    for step in range(draws):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        method.load_state_dict({"step": step})
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        method.update()
        total = total + flat(p.abs() - before[n].abs() for n, p in model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    sizes = flat(before.values()).abs()
    shares = (total / draws / sizes).split([before[name].numel() for name in names])
    for name, share in zip(names, shares, strict=True):
        expected = 1e-4 if "lora" in name else 0.0
        assert share.mean().abs().item() == pytest.approx(expected, rel=0.6, abs=1e-12), name


SMALL = [
    Case(methods.RWP, {"sigma": 1e-6}),
    Case(methods.LPFSGD, {"sigma": 1e-6}),
    Case(methods.MixedRWP, {"sigma": 1e-6}),
    Case(methods.ARWP, {"sigma": 1e-6}),
    Case(methods.FlatLoRA, {"sigma": 1e-5}),
    Case(methods.FlatLoRA, {"sigma": 1e-5, "mode": "inplace"}),
    Case(methods.MeZO, {"mu": 1e-7}),
    Case(methods.SAM, {"rho": 1e-5}),
    Case(methods.ASAM, {"rho": 1e-5}),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_lost_steps_are_told_of_once(case):
    model = in_16_bits()
    method = case(model, sgd(model, lr=0.0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            method.step(loss_fn_of(model), make_batches(2, torch.bfloat16))
    (warning,) = told
    assert str(warning.message).startswith(case.type.__name__)
    assert "float32 weights take it exactly" in str(warning.message)


@cases(lambda case: case.type is not methods.BAR)
def test_nothing_is_told_of_where_weights_are_wide(case):
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(model, sgd(model)).step(loss_fn_of(model), make_batches(2))


def test_a_ramp_that_starts_at_zero_is_not_a_lost_step():
    model = in_16_bits()
    noise = {"sigma": 0.1, "schedule": lambda step: step / 1000, "mode": "inplace"}
    method = methods.FlatLoRA(model, sgd(model), **noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            method.step(loss_fn_of(model), make_batches(1, torch.bfloat16))


def test_words_are_those_of_the_place():
    # A weight written in two halves of its rows is that written at once.
    from flatkern.methods import _rounding

    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = torch.full_like(weight, 1e-4, dtype=torch.float32)
    whole, panels = weight.clone(), weight.t().contiguous().t()
    _rounding.add_(whole, step, NoiseKey(1, 2, 0, 3))
    panel, _rounding._PANEL = _rounding._PANEL, 35
    try:
        _rounding.add_(panels, step, NoiseKey(1, 2, 0, 3))
    finally:
        _rounding._PANEL = panel
    assert torch.equal(whole, panels)
    assert not torch.equal(whole, weight)
