"""Which weights each scope perturbs, and with what scale, against definitions in float64."""

import math

import pytest
import tolerances
import torch
from noisy_models import assert_clean, clean_weights
from torch import nn

import flatkern
from flatkern.noise.numbers import tensor_numbers

STRATEGIES = ["gaussian", "matrix", "element", "row", "flat_lora"]


class Model(nn.Module):
    """An embedding that is tied to the output, a norm, an adapted and a plain layer, a number."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 12)
        self.norm = nn.LayerNorm(12)
        self.adapted = nn.Linear(12, 12)
        self.plain = nn.Linear(12, 12, bias=False)
        self.out = nn.Linear(12, 10, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.index = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.to(dtype)
        flatkern.nn.replace_linear(self, ["adapted"], r=3, init_lora_weights=False)
        self.norm.weight.data[3] = 0
        self.plain.weight.requires_grad_(True)

    def forward(self, ids):
        return self.out(self.plain(self.adapted(self.norm(self.embed(ids))))) * self.scale


BASE = ["scale", "embed.weight", "norm.weight", "norm.bias", "adapted.weight", "adapted.bias"]
BASE += ["plain.weight"]
ADAPTERS = ["adapted.lora_A", "adapted.lora_B"]
SCOPES = {
    "merged": ["adapted.weight"],
    "origin": BASE,
    "lora": ADAPTERS,
    "full": BASE + ADAPTERS,
    "all": BASE,
    "trainable": [*ADAPTERS, "plain.weight"],
}
# In named_parameters() order with `index`, which takes no noise, behind `scale`.
NUMBERS = {name: number + (number > 0) for number, name in enumerate(BASE)}
NUMBERS |= {name: 2**31 + number for number, name in enumerate(ADAPTERS)}


def expected_scale(weight, strategy, sigma):
    """The standard deviation of every element, from the definition."""
    weight = weight.double()
    matrix = weight.reshape(weight.shape[0] if weight.dim() else 1, -1)
    rows = matrix.norm(dim=1, keepdim=True).expand_as(matrix)
    if strategy == "row" and weight.dim() < 2:
        rows = torch.full_like(matrix, weight.norm())
    scale = {
        "gaussian": torch.ones_like(matrix),
        "matrix": torch.full_like(matrix, weight.norm()),
        "element": matrix.abs(),
        "row": rows,
        "flat_lora": rows / math.sqrt(matrix.shape[1]),
    }[strategy]
    return sigma * scale.view(weight.shape)


def noise_of(weight, number, seed, step, draw):
    key = flatkern.NoiseKey(seed, step, draw, number).to("cpu")
    rows = weight.shape[0] if weight.dim() else 1
    return flatkern.ops.noise(rows, weight.numel() // rows, key).view(weight.shape).double()


@pytest.mark.parametrize("restore", ["residual", "snapshot", "host"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_and_strategy(scope, strategy, restore):
    model = Model()
    before = clean_weights(model)
    noise = flatkern.WeightNoise(
        model, 0.3, strategy=strategy, scope=scope, mode="inplace", restore=restore, seed=7
    )
    assert sorted(noise.names) == sorted(SCOPES[scope])
    layer = model.adapted
    with noise.window(step=5, draw=2):
        seen = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, value in model.state_dict().items():  # clean inside the window too
            tolerances.assert_same_bits(value, before[name])
    for name, value in seen.items():
        if name not in SCOPES[scope]:
            tolerances.assert_same_bits(value, before[name])
            continue
        source, own = before[name], strategy
        if scope in ("merged", "all") and name == "adapted.weight":
            source = before[name].double() + layer.scaling * (
                before["adapted.lora_B"].double() @ before["adapted.lora_A"].double()
            )
        elif scope == "all":
            own = "element"
        scale = expected_scale(source, own, 0.3)
        if own == "element":  # of the weight that is written
            scale = expected_scale(before[name], own, 0.3)
        added = scale * noise_of(before[name], NUMBERS[name], 7, 5, 2)
        # c is good to a few float32 steps; then e and the sum are rounded once each.
        bound = 1e-5 * added.abs() + tolerances.ulp(before[name].double() + added, torch.float32)
        tolerances.assert_within(value, before[name].double() + added, bound)
    assert_clean(model, before)


@pytest.mark.parametrize("scope", ["origin", "full", "all"])
@pytest.mark.parametrize("strategy", ["flat_lora", "element"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_modes_agree(scope, strategy, dtype):
    losses = []
    for mode in ("virtual", "inplace"):
        model = Model(dtype)
        before = clean_weights(model)
        noise = flatkern.WeightNoise(model, 0.2, strategy=strategy, scope=scope, mode=mode)
        with noise.window():
            loss = model(torch.arange(4)).double().square().sum()
            loss.backward()
        losses.append(loss.item())
        assert_clean(model, before)
        lines = noise.summary().splitlines()
        by_name = {line.split()[0]: line.split()[-1] for line in lines[:-1]}
        assert by_name.pop("adapted.weight") == mode
        assert set(by_name.values()) == {"inplace"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-9 if dtype == torch.float64 else 0.1)


def test_numbers_depend_on_no_scope_and_no_wrapping():
    numbers = tensor_numbers(Model())
    assert {name: numbers[name] for name in NUMBERS} == NUMBERS
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = tensor_numbers(plain)
    flatkern.nn.replace_linear(plain, ["1"], r=1)
    after = tensor_numbers(plain)
    assert {name: after[name] for name in before} == before


def test_zeros_stay_zero_in_all():
    model = Model()
    with flatkern.WeightNoise(model, 5.0, scope="all", mode="inplace").window():
        assert model.norm.weight[3] == 0
        assert (model.norm.bias == 0).all()
        assert not torch.equal(model.norm.weight, torch.ones(12))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_an_error_inside_leaves_every_weight(error, mode):
    model = Model()
    before = clean_weights(model)

    def interrupted(noise):
        with noise.window():
            raise error

    for scope in SCOPES:
        with pytest.raises(error):
            interrupted(flatkern.WeightNoise(model, 0.3, scope=scope, mode=mode))
        assert_clean(model, before)


def test_a_late_backward_raises():
    model = Model()
    noise = flatkern.WeightNoise(model, 0.3, scope="trainable")
    with noise.window():
        loss = model(torch.arange(4)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("scope", "needed"),
    [("merged", "LoRALinear"), ("lora", "LoRALinear"), ("trainable", "trainable")],
)
def test_nothing_in_scope(scope, needed):
    model = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=f"{needed}.* got nothing to perturb"):
        flatkern.WeightNoise(model, scope=scope)


def test_fisher_divides_the_scale_of_its_rows():
    model = Model()
    before = clean_weights(model)
    fisher = flatkern.Fisher(eta=0.5, beta=0.9)
    noise = flatkern.WeightNoise(
        model, 0.3, strategy="fisher", scope="trainable", mode="inplace", fisher=fisher
    )

    def added(name):
        with noise.window(step=0):
            return model.get_parameter(name).detach().double() - before[name].double()

    first = {name: added(name) for name in SCOPES["trainable"]}
    squares = torch.arange(12.0)
    fisher.observe({"plain.weight": squares})
    fisher.observe({"plain.weight": 2 * squares})
    expected = (0.9 + 2) * squares
    torch.testing.assert_close(fisher.rows["plain.weight"], expected)
    # Both are differences of float32 weights below 1 and their sums with noise below 8.
    divided = first["plain.weight"] / (1 + 0.5 * expected.double()[:, None]).sqrt()
    torch.testing.assert_close(added("plain.weight"), divided, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(added("adapted.lora_A"), first["adapted.lora_A"], rtol=0, atol=0)


def test_a_constant_gradient_fills_fisher_to_its_limit():
    fisher = flatkern.Fisher(beta=0.75)
    for _ in range(100):
        fisher.observe({"w": torch.tensor([4.0])})
    assert fisher.rows["w"].item() == pytest.approx(4 / (1 - 0.75), rel=1e-6)
    other = flatkern.Fisher(beta=0.75)
    other.load_state_dict(fisher.state_dict())
    fisher.observe({"w": torch.tensor([0.0])})
    assert other.rows["w"].item() == pytest.approx(16.0, rel=1e-6)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"eta": -1.0}, ValueError),
        ({"eta": math.nan}, ValueError),
        ({"eta": None}, TypeError),
        ({"beta": 1.0}, ValueError),
        ({"beta": -0.1}, ValueError),
        ({"beta": math.nan}, ValueError),
    ],
    ids=str,
)
def test_fishers_options_are_checked(option, error):
    with pytest.raises(error, match=next(iter(option))):
        flatkern.Fisher(**option)


def test_fishers_state_is_checked():
    for state in ([], {"w": 1.0}):
        with pytest.raises(TypeError):
            flatkern.Fisher().load_state_dict(state)
