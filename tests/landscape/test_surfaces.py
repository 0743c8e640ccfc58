"""Grids and their directions: orthogonal by row, resumed to the bit, refused where they must be."""

import json
import math

import pytest
import torch
from quadratics import Quadratic, bits, made
from torch import nn

import flatkern
from flatkern import landscape
from flatkern.nn import LoRALinear, replace_linear


@pytest.mark.parametrize("name", ["mlp", "tied", "convolutions"])
def test_directions_are_orthogonal_by_row_and_as_long_as_the_weights(name):
    model, _ = made(name)
    plane = landscape.Plane(model, seed=3)
    assert plane.names == [n for n, p in model.named_parameters() if p.dim() > 1]
    for name in plane.names:
        first, second = (plane.direction(model, name, axis).double() for axis in (0, 1))
        weight = model.get_parameter(name).double()
        if name == "layers.2.weight":  # ConvTranspose1d of two groups: outputs are columns
            first, second, weight = (
                v.view(2, 2, 3, 3).transpose(1, 2).reshape(6, 6) for v in (first, second, weight)
            )
        first, second, weight = (v.reshape(v.shape[0], -1) for v in (first, second, weight))
        lengths = weight.norm(dim=1)
        cosines = (first * second).sum(1) / lengths.square()
        assert cosines.abs().max() < 1e-6
        for direction in (first, second):
            torch.testing.assert_close(direction.norm(dim=1), lengths, rtol=1e-6, atol=0)


def test_global_directions_are_orthogonal_as_a_whole():
    model, _ = made("mlp")
    plane = landscape.Plane(model, normalize="global")
    pairs = [
        [plane.direction(model, name, axis).double().flatten() for axis in (0, 1)]
        for name in plane.names
    ]
    assert len(pairs) == 4  # biases as well
    first, second = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    length = torch.cat([p.double().flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(first.norm(), length, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.norm(), length, rtol=1e-6, atol=0)
    assert abs(first @ second) < 1e-6 * length**2
    # The same normal everywhere, so not filter-normalised.
    z = flatkern.ops.noise(8, 6, flatkern.NoiseKey(0, 2**32 - 1, 0, 0).to("cpu"))
    ratio = pairs[0][0] / z.double().flatten()
    assert (ratio / ratio[0] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("normalize", ["filter", "global"])
def test_the_row_for_padding_keeps_still(normalize):
    model = nn.Embedding(6, 9, padding_idx=2)
    nn.init.normal_(model.weight)
    plane = landscape.Plane(model, normalize=normalize)
    for axis in (0, 1):
        direction = plane.direction(model, "weight", axis)
        assert (direction[2] == 0).all()
        assert (direction[[0, 1, 3, 4, 5]] != 0).all()
    moved = model.weight.detach()[[0, 1, 3, 4, 5]].norm()
    torch.testing.assert_close(plane.direction(model, "weight", 0).norm(), moved, rtol=1e-6, atol=0)


def test_a_row_of_one_element_has_no_second_direction():
    model = nn.Linear(1, 5)
    plane = landscape.Plane(model)
    assert (plane.direction(model, "weight", 1) == 0).all()
    first = plane.direction(model, "weight", 0).abs()
    torch.testing.assert_close(first, model.weight.data.abs(), rtol=1e-6, atol=0)


def test_a_bowl():
    model = Quadratic(dtype=torch.float32)
    model.h.fill_(1.0)
    model.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    square = float(model.weight.detach().square().sum())
    # With the weights as the origin: L(W + d) - L(W) - slope = 1/2 |d|^2, d = x V1 + y V2.
    surface = landscape.surface_2d(model, model.loss, points=5, radius=1.0)
    both = surface.loss + surface.loss.flip(0, 1)
    x = surface.coordinates.square()
    expected = 2 * surface.plain + square * (x[:, None] + x[None, :])
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=0)


def test_one_direction_is_a_line_of_the_plane():
    model, loss = made("mlp")
    line = landscape.surface_1d(model, loss, points=5, seed=2)
    plane = landscape.surface_2d(model, loss, points=5, seed=2)
    assert torch.equal(line.loss, plane.loss[:, 2])
    other = landscape.surface_1d(model, loss, points=5, seed=2, draw=9)
    assert other.loss[2] == line.loss[2]
    assert (other.loss != line.loss).sum() == 4
    # Through the worst draw: any two numbers.
    through = landscape.surface_2d(model, loss, points=5, seed=2, draws=(9, 0))
    assert torch.equal(through.loss[:, 2], other.loss)


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    replace_linear(model, "all-linear", r=2)
    x = torch.randn(9, 6)
    return model, lambda: model(x).square().mean()


def test_adapters_along_the_same_directions():
    model, loss = adapted()
    plane = landscape.Plane(model)
    assert plane.names == ["0.weight", "2.weight"]
    first = landscape.surface_1d(model, loss, points=3, plane=plane)
    lengths = [plane.direction(model, name, 0).norm() for name in plane.names]
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    second = landscape.surface_1d(model, loss, points=3, plane=plane)
    assert (first.loss != second.loss).all()
    assert lengths == [plane.direction(model, name, 0).norm() for name in plane.names]
    # Without it each has the lengths of its own merged weight, along the same z.
    own = landscape.Plane(model)
    for name in own.names:
        pair = plane.direction(model, name, 0), own.direction(model, name, 0)
        cosine = nn.functional.cosine_similarity(*pair)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-6, atol=0)
        merged = model.get_submodule(name.removesuffix(".weight")).merged_weight()
        torch.testing.assert_close(pair[1].norm(dim=1), merged.norm(dim=1), rtol=1e-5, atol=0)


def test_the_adapters_own_space():
    model, loss = adapted()
    before = bits(model)
    surface = landscape.surface_1d(model, loss, points=3, scope="lora")
    # B is 0: its rows have no length, so W' keeps still whatever A does.
    assert (surface.loss == surface.plain).all()
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    surface = landscape.surface_1d(model, loss, points=3, scope="lora")
    assert (surface.loss != surface.plain).sum() == 2
    assert all(
        torch.equal(value, before[name])
        for name, value in model.state_dict().items()
        if "lora_B" not in name
    )


class Stopped(BaseException):
    """As Ctrl-C."""


def test_an_interrupted_grid_goes_on_where_it_stopped(tmp_path):
    model, loss = made("mlp")
    whole = landscape.surface_2d(model, loss, points=5)
    path, calls = tmp_path / "surface.json", 0

    def stopping():
        nonlocal calls
        calls += 1
        if calls == 9:
            raise Stopped
        return loss()

    with pytest.raises(Stopped):
        landscape.surface_2d(model, stopping, points=5, save=path)
    part = landscape.Surface.load(path)
    # Two calls find the plain loss and how weights are used.
    assert int(part.done.sum()) == 6
    assert torch.equal(part.loss[part.done], whole.loss[part.done])
    assert part.loss[~part.done].isnan().all()
    calls = -1000
    rest = landscape.surface_2d(model, stopping, points=5, save=path)
    assert calls == -1000 + 2 + 25 - 6 - 1  # the centre is the plain loss
    assert torch.equal(rest.loss, whole.loss)
    again = landscape.Surface.load(path)
    assert torch.equal(again.loss, whole.loss)
    assert again.done.all()
    assert (again.plain, again.draws, again.scope) == (whole.plain, (0, 1), None)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_is_kept_and_saved(tmp_path):
    model, _ = made("mlp")
    values = iter([1.0, 1.0, math.nan, math.inf, -math.inf, 2.0])
    surface = landscape.surface_1d(model, lambda: next(values), points=5, save=tmp_path / "s.json")
    expected = torch.tensor([math.nan, math.inf, 1.0, -math.inf, 2.0], dtype=torch.float64)
    assert torch.equal(surface.loss.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert surface.done.all()
    text = (tmp_path / "s.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # strict JSON
    loaded = landscape.Surface.load(tmp_path / "s.json")
    assert torch.equal(loaded.loss.nan_to_num(nan=7.0), surface.loss.nan_to_num(nan=7.0))
    assert loaded.done.all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "where seed is 0, not 1"),
        ({"radius": 0.5}, "radius"),
        ({"points": 7}, r"\[7, 7\]"),
        ({"draws": (0, 2)}, "draws"),
        ({"normalize": "global"}, "normalize"),
        ({"scope": "origin"}, "scope"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_of_another_surface_is_refused(tmp_path, changed, message):
    model, loss = made("mlp")
    path = tmp_path / "s.json"
    landscape.surface_2d(model, loss, points=3, save=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        landscape.surface_2d(model, loss, **{"points": 3, "save": path} | changed)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with pytest.raises(ValueError, match="the loss at the weights"):
        landscape.surface_2d(model, loss, points=3, save=path)
    assert path.read_bytes() == before


def test_files_that_cannot_be_read_or_written(tmp_path):
    model, loss = made("mlp")
    calls = 0

    def counting():
        nonlocal calls
        calls += 1
        return loss()

    with pytest.raises(OSError, match="nowhere"):
        landscape.surface_2d(model, counting, points=3, save=tmp_path / "nowhere" / "s.json")
    assert calls == 2  # before the first point
    for text in ("{}", "[1]", "nonsense", '{"format": "flatkern surface 1", "loss": [1.0]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"what Surface\.save wrote"):
            landscape.Surface.load(tmp_path / "bad.json")


BAD = [
    ({"points": 1}, ValueError, "points must be at least 2, got int 1"),
    ({"points": 2.5}, TypeError, "points must be int"),
    ({"radius": 0}, ValueError, "radius must be finite and above 0"),
    ({"radius": math.nan}, ValueError, "radius"),
    ({"draws": (1, 1)}, ValueError, "draws must be two different"),
    ({"draws": (0, -1)}, ValueError, "draws"),
    ({"normalize": "row"}, ValueError, "normalize must be 'filter' or 'global'"),
    ({"seed": 2**32}, ValueError, "seed"),
    ({"plane": 3}, TypeError, "plane must be Plane"),
    ({"scope": "merged"}, ValueError, "scope 'merged'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_input(options, kind, message):
    model, loss = made("mlp")
    with pytest.raises(kind, match=message):
        landscape.surface_2d(model, loss, **{"points": 3} | options)


def test_a_plane_of_another_model():
    model, loss = made("mlp")
    plane = landscape.Plane(nn.Sequential(nn.Linear(6, 9)))
    with pytest.raises(ValueError, match=r"plane must be .* 9 rows of 0\.weight"):
        landscape.surface_2d(model, loss, points=3, plane=plane)


def test_where_there_are_only_vectors_each_is_a_row():
    model = nn.LayerNorm(40)
    nn.init.normal_(model.bias)
    plane = landscape.Plane(model)
    assert plane.names == ["weight", "bias"]
    for name in plane.names:
        first, second = (plane.direction(model, name, axis).double() for axis in (0, 1))
        length = model.get_parameter(name).double().norm()
        for direction in (first, second):
            torch.testing.assert_close(direction.norm(), length, rtol=1e-6, atol=0)
        assert abs(first @ second) < 1e-6 * length**2


def test_a_bar_needs_tqdm(monkeypatch, capsys):
    model, loss = made("mlp")
    landscape.surface_1d(model, loss, points=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"flatkern\[plot\]"):
        landscape.surface_1d(model, loss, points=3, progress=True)
