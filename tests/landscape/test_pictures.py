"""Pictures: files of the kind that was asked for, with what they must show, and nothing global."""

import importlib.util
import math
import sys

import pytest
import torch
from quadratics import made

from flatkern import landscape
from flatkern.landscape import plots

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
needs_plotly = pytest.mark.skipif(
    importlib.util.find_spec("plotly") is None, reason="plotly is not installed"
)


def surface(points=5, dimensions=2, shift=0.0):
    coordinates = torch.linspace(-1, 1, points, dtype=torch.float64)
    loss = coordinates.square() + 1 + shift
    if dimensions == 2:
        loss = loss[:, None] + 2 * coordinates.square()[None, :]
    done = torch.ones_like(loss, dtype=torch.bool)
    return landscape.Surface(loss, coordinates, 1.0, 1.0, 0, (0, 1), "filter", None, done)


def curve():
    sigmas = torch.tensor([0.05, 0.1], dtype=torch.float64)
    losses = 1 + torch.rand(2, 4, 2, dtype=torch.float64)
    return landscape.RadiusCurve(sigmas, losses, 1.0)


@needs_matplotlib
@pytest.mark.parametrize(("kind", "suffix"), [("contour", ".png"), ("3d", ".svg")])
def test_surfaces(tmp_path, kind, suffix):
    path = tmp_path / f"one{suffix}"
    assert landscape.plot_surface(surface(), path, kind=kind, title="a title") == path
    assert path.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])
    several = {"one": surface(3), "two": surface(3, shift=3.0), "3": surface(3), "4": surface(3)}
    landscape.plot_surface(several, tmp_path / f"four{suffix}", kind=kind, log=True)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_a_missing_folder_is_named(tmp_path, suffix):
    path = tmp_path / "absent" / f"one{suffix}"
    with pytest.raises(FileNotFoundError, match=r"plot_surface: path must be .*absent"):
        landscape.plot_surface(surface(), path)
    if suffix == ".png":
        with pytest.raises(FileNotFoundError, match=r"plot_radius: path must be .*absent"):
            landscape.plot_radius(curve(), path)


@needs_matplotlib
def test_lines(tmp_path):
    lines = {"a": surface(dimensions=1), "b": surface(dimensions=1)}
    assert landscape.plot_surface(lines, tmp_path / "lines.svg", log=True).is_file()
    curves = {"a": curve(), "b": curve()}
    assert landscape.plot_radius(curves, tmp_path / "curves.svg").is_file()


@needs_matplotlib
def test_surfaces_side_by_side_share_a_scale(tmp_path, monkeypatch):
    norms = []
    scale = plots._scale
    monkeypatch.setattr(plots, "_scale", lambda *a: norms.append(a) or scale(*a))
    pair = {"low": surface(), "high": surface(shift=5.0)}
    landscape.plot_surface(pair, tmp_path / "pair.png")
    assert norms == [(False, 1.0, 9.0)]


@needs_matplotlib
def test_losses_that_are_no_numbers_are_marked(tmp_path):
    broken = surface()
    broken.loss[0, 3], broken.loss[4, 4] = math.nan, math.inf
    broken.loss[1, 1], broken.done[1, 1] = math.nan, False
    figures = []
    saved = plots._saved

    def keep(pyplot, figure, *rest):
        figures.append(figure)
        return saved(pyplot, figure, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_saved", keep)
        landscape.plot_surface(broken, tmp_path / "broken.png")
    (marks,) = [c for c in figures[0].axes[0].collections if c.get_label() == "not finite"]
    # x along V1, y along V2.
    assert sorted(map(tuple, marks.get_offsets().tolist())) == [(-1.0, 0.5), (1.0, 1.0)]
    landscape.plot_surface(broken, tmp_path / "broken.svg", kind="3d")


@needs_plotly
def test_a_page_to_turn(tmp_path):
    broken = surface()
    broken.loss[0, 3] = math.nan
    path = tmp_path / "page.html"
    landscape.plot_surface({"left": broken, "right": surface()}, path, title="two")
    page = path.read_text()
    assert "left" in page
    assert "Plotly.newPlot" in page
    # Read without a network.
    assert '<script src="http' not in page
    landscape.plot_surface(surface(dimensions=1), path, log=True)


@needs_matplotlib
def test_no_global_state_and_no_window(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    landscape.plot_surface(surface(), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("value", "options", "kind", "message"),
    [
        (3, {}, TypeError, "surface must be Surface or Mapping"),
        ({}, {}, ValueError, "surface must be at least one"),
        ({"a": 3}, {}, TypeError, "must be Surface, got int"),
        (None, {"kind": "bar"}, ValueError, "kind must be 'contour' or '3d'"),
        (None, {"levels": 1}, ValueError, "levels must be at least 2"),
        (None, {"path": "a.txt"}, ValueError, r"path must be a file that ends in \.png"),
    ],
    ids=["kind", "none", "a-dict", "form", "levels", "path"],
)
def test_bad_input(tmp_path, value, options, kind, message):
    value = surface() if value is None else value
    path = tmp_path / options.pop("path", "a.png")
    with pytest.raises(kind, match=message):
        landscape.plot_surface(value, path, **options)
    assert not path.exists()


def test_surfaces_that_cannot_be_drawn(tmp_path):
    empty = surface()
    empty.loss.fill_(math.nan)
    with pytest.raises(ValueError, match="finite loss"):
        landscape.plot_surface(empty, tmp_path / "a.png")
    negative = surface(shift=-3.0)
    with pytest.raises(ValueError, match="log must be False where a loss is -2"):
        landscape.plot_surface(negative, tmp_path / "a.png", log=True)
    with pytest.raises(ValueError, match="all along one direction or all over planes"):
        landscape.plot_surface({"a": surface(), "b": surface(dimensions=1)}, tmp_path / "a.png")


@pytest.mark.parametrize(("library", "path"), [("matplotlib", "a.png"), ("plotly", "a.html")])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, library, path):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library} \(pip install 'flatkern\[plot\]'\)"):
        landscape.plot_surface(surface(), tmp_path / path)


@needs_matplotlib
def test_an_unwritable_path(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        landscape.plot_surface(surface(), tmp_path / "nowhere" / "a.png")


@needs_matplotlib
def test_what_was_measured_can_be_drawn(tmp_path):
    model, loss = made("mlp")
    found = landscape.surface_2d(model, loss, points=3, save=tmp_path / "s.json")
    loaded = landscape.Surface.load(tmp_path / "s.json")
    assert torch.equal(loaded.loss, found.loss)
    assert landscape.plot_surface(loaded, tmp_path / "b.svg").is_file()
