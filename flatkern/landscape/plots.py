"""Pictures of surfaces and curves: PNG, SVG or PDF by matplotlib, interactive HTML by plotly."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatkern.landscape.flatness import RadiusCurve
from flatkern.landscape.surfaces import Surface
from flatkern.ops import _check

# Perceptually even, and told apart without red or green.
_COLORS = "viridis"
# Okabe and Ito's palette, in an order of which neighbours differ in lightness.
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_KINDS = ("contour", "3d")
_PICTURES = (".png", ".svg", ".pdf")
_ALL = (*_PICTURES, ".html")


def plot_surface(
    surface: Surface | Mapping[str, Surface],
    path: str | os.PathLike,
    *,
    kind: str = "contour",
    title: str | None = None,
    levels: int = 20,
    log: bool = False,
) -> Path:
    """Draw a surface, or several side by side on one scale of colours.

    The centre is marked; a point whose loss is NaN or infinite is a cross, one that an interrupted
    run did not come to is blank. A surface along one direction is a line.

    Args:
        surface: of `surface_2d` or `surface_1d`, or several by their titles, all of one kind.
        path: .png, .svg or .pdf (matplotlib), or .html (plotly, to be turned and read off).
        kind: "contour" or "3d"; a line is a line.
        title: above the picture.
        levels: of a contour, about so many, at least 2.
        log: colour by the logarithm of the loss; only losses above 0.

    Returns:
        the path.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; surfaces without a finite
            point.
        ImportError: matplotlib or plotly is missing; the extra that brings it is named.
        OSError: the path cannot be written (FileNotFoundError: its folder is missing).
    """
    op = "plot_surface"
    surfaces = _named(op, "surface", surface, Surface)
    _check.one_of(op, _KINDS, kind=kind)
    _check.kinds(op, int, levels=levels)
    if levels < 2:
        _check.refuse(op, "levels", "at least 2", levels)
    _check.kinds(op, bool, log=log)
    path = _path(op, path)
    dimensions = {one.loss.dim() for one in surfaces.values()}
    if len(dimensions) > 1:
        _check.refuse(op, "surface", "all along one direction or all over planes", [*surfaces])
    finite = [one.loss[one.loss.isfinite()] for one in surfaces.values()]
    values = [part for part in finite if part.numel()]
    if not values:
        _check.refuse(op, "surface", "one with a finite loss", finite[0])
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if log and low <= 0:
        _check.refuse(op, "log", f"False where a loss is {low:.3g}", log)
    if path.suffix == ".html":
        from flatkern.landscape._html import html_surfaces

        return html_surfaces(surfaces, path, title, log, (low, high))
    pyplot = _pyplot(op)
    if dimensions == {1}:
        figure = _lines(pyplot, surfaces, log)
    elif kind == "contour":
        figure = _contours(pyplot, surfaces, levels, log, low, high)
    else:
        figure = _hills(pyplot, surfaces, log, low, high)
    return _saved(pyplot, figure, path, title)


def plot_radius(
    curves: RadiusCurve | Mapping[str, RadiusCurve],
    path: str | os.PathLike,
    *,
    title: str | None = None,
    worst: bool = True,
) -> Path:
    """Draw how the loss rises with the strength of the noise, with bands of confidence.

    Args:
        curves: of `radius_curve`, one or several by their names.
        path: .png, .svg or .pdf.
        title: above the picture.
        worst: also the worst sampled draw, as thin lines.

    Returns:
        the path.

    Raises:
        As `plot_surface`.
    """
    op = "plot_radius"
    curves = _named(op, "curves", curves, RadiusCurve)
    path = _path(op, path, _PICTURES)
    pyplot = _pyplot(op)
    figure, axes = pyplot.subplots(figsize=(6, 4.2))
    for i, (name, curve) in enumerate(curves.items()):
        color, x = _LINES[i % len(_LINES)], curve.sigmas.numpy()
        style = {"color": color, "linestyle": _DASHES[i % len(_DASHES)]}
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(x, curve.mean.numpy(), marker=marker, markersize=5, label=name, **style)
        band = curve.low.numpy(), curve.high.numpy()
        axes.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
        if worst:
            axes.plot(x, curve.worst.numpy(), linewidth=0.8, alpha=0.8, **style)
        missing = ~curve.mean.isfinite()
        if missing.any():
            axes.plot(x[missing.numpy()], [0.0] * int(missing.sum()), "x", color=color)
    axes.set_xlabel(r"$\sigma$, the noise's strength")
    kinds = ", thin: the worst draw" if worst else ""
    axes.set_ylabel("rise of the loss")
    confidence = next(iter(curves.values())).confidence
    axes.text(
        0.02, 0.98, f"bands: {confidence:.0%} of the mean{kinds}", transform=axes.transAxes,
        va="top", fontsize=8, color="0.35",
    )  # fmt: skip
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.grid(alpha=0.25)
    if len(curves) > 1 or "" not in curves:
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.93), frameon=False)
    return _saved(pyplot, figure, path, title)


def _named(op: str, argument: str, value: Any, kind: type) -> dict[str, Any]:
    if isinstance(value, kind):
        return {"": value}
    _check.kinds(op, (kind, Mapping), **{argument: value})
    if not value:
        _check.refuse(op, argument, "at least one", dict(value))
    for name, one in value.items():
        _check.kinds(op, kind, **{f"{argument}[{name!r}]": one})
    return dict(value)


def _path(op: str, path: str | os.PathLike, accepted: Sequence[str] = _ALL) -> Path:
    _check.kinds(op, (str, os.PathLike), path=path)
    path = Path(path)
    if path.suffix not in accepted:
        _check.refuse(op, "path", f"a file that ends in {', '.join(accepted)}", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{op}: path must be in a folder that exists, got {str(path)!r}; make {path.parent}"
        )
    return path


def _pyplot(op: str) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        hint = "pip install 'flatkern[plot]'"
        raise ImportError(f"{op} needs matplotlib ({hint})") from error
    from matplotlib.figure import Figure

    class Pyplot:
        """Figures that belong to no window and no global state."""

        colormap = matplotlib.colormaps[_COLORS]

        @staticmethod
        def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
            subplot = options.pop("subplot_kw", None)
            figure = Figure(layout="constrained", **options)
            return figure, figure.subplots(rows, columns, subplot_kw=subplot)

    return Pyplot


def _saved(pyplot: Any, figure: Any, path: Path, title: str | None) -> Path:
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=160)
    return path


def _scale(log: bool, low: float, high: float) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    high = high if high > low else low + max(abs(low), 1.0) * 1e-6
    return (LogNorm if log else Normalize)(low, high)


def _grid(surface: Surface) -> tuple[Any, Any, Any]:
    """x, y and the loss, rows for y; masked where it is not finite."""
    import numpy

    x = surface.coordinates.numpy()
    return x, x, numpy.ma.masked_invalid(surface.loss.T.numpy())


def _label(axes: Any, name: str) -> None:
    axes.set_xlabel("along $V_1$")
    axes.set_ylabel("along $V_2$")
    if name:
        axes.set_title(name, fontsize=11)


def _contours(
    pyplot: Any, surfaces: dict[str, Surface], levels: int, log: bool, low: float, high: float
) -> Any:
    import numpy
    from matplotlib.ticker import MaxNLocator

    figure, panels = _make_panels(pyplot, len(surfaces))
    norm = _scale(log, low, high)
    # Round numbers; the outer two hold what lies between.
    steps = MaxNLocator(levels).tick_values(norm.vmin, norm.vmax)
    if log:
        steps = numpy.geomspace(norm.vmin, norm.vmax, levels + 1)
    for axes, (name, surface) in zip(panels, surfaces.items(), strict=False):
        x, y, loss = _grid(surface)
        filled = axes.contourf(x, y, loss, levels=steps, norm=norm, cmap=pyplot.colormap)
        axes.contour(x, y, loss, levels=steps, colors="white", linewidths=0.4, alpha=0.7)
        axes.plot(0, 0, marker="+", color="white", markersize=11, markeredgewidth=2.2)
        axes.plot(0, 0, marker="+", color="black", markersize=9, markeredgewidth=1)
        _mark_missing(axes, surface)
        axes.set_aspect("equal")
        limit = surface.radius
        axes.set_xlim(-limit, limit)
        axes.set_ylim(-limit, limit)
        _label(axes, name)
    bar = figure.colorbar(filled, ax=panels, shrink=0.9, format="%.3g")
    bar.set_label("loss")
    return figure


def _mark_missing(axes: Any, surface: Surface) -> None:
    """A cross where the loss is no number."""
    wrong = (surface.done & ~surface.loss.isfinite()).nonzero()
    if len(wrong):
        x = surface.coordinates
        style = {"color": "#D55E00", "s": 18, "marker": "x", "linewidths": 1.0, "zorder": 3}
        axes.scatter(x[wrong[:, 0]], x[wrong[:, 1]], label="not finite", **style)
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        axes.legend(fontsize=8, frameon=False, handletextpad=0.1, **place)


def _make_panels(pyplot: Any, count: int, **subplot: Any) -> tuple[Any, list]:
    import numpy

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = 4.4 * columns + 0.9, 4.0 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, subplot_kw=subplot or None)
    panels = list(numpy.atleast_1d(axes).flatten())
    for spare in panels[count:]:
        figure.delaxes(spare)
    return figure, panels[:count]


def _hills(pyplot: Any, surfaces: dict[str, Surface], log: bool, low: float, high: float) -> Any:
    import numpy

    figure, panels = _make_panels(pyplot, len(surfaces), projection="3d")
    norm = _scale(log, low, high)
    for axes, (name, surface) in zip(panels, surfaces.items(), strict=True):
        x, y, loss = _grid(surface)
        height = numpy.log10(loss) if log else loss
        grid = numpy.meshgrid(x, y)
        colors = pyplot.colormap(norm(loss))
        axes.plot_surface(
            *grid, height, facecolors=colors, rstride=1, cstride=1, linewidth=0.15,
            edgecolor=(1, 1, 1, 0.25), antialiased=True, shade=False,
        )  # fmt: skip
        ends = (math.log10(low), math.log10(high)) if log else (low, high)
        axes.set_zlim(*ends)
        axes.set_zlabel("log10 of the loss" if log else "loss")
        axes.view_init(elev=32, azim=-58)
        _label(axes, name)
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(norm, pyplot.colormap)
    figure.colorbar(mappable, ax=panels, shrink=0.7, pad=0.1, format="%.3g").set_label("loss")
    return figure


def _lines(pyplot: Any, surfaces: dict[str, Surface], log: bool) -> Any:
    figure, axes = pyplot.subplots(figsize=(6, 4.2))
    for i, (name, surface) in enumerate(surfaces.items()):
        x, loss = surface.coordinates.numpy(), surface.loss
        style = {"color": _LINES[i % len(_LINES)], "linestyle": _DASHES[i % len(_DASHES)]}
        axes.plot(x, loss.numpy(), label=name, **style)
        wrong = surface.done & ~loss.isfinite()
        if wrong.any():
            floor = float(loss[loss.isfinite()].min())
            axes.plot(x[wrong.numpy()], [floor] * int(wrong.sum()), "x", color=style["color"])
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("along $V_1$")
    axes.set_ylabel("loss")
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    if "" not in surfaces:
        axes.legend(frameon=False)
    return figure
