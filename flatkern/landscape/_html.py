"""Surfaces that can be turned: one HTML file, by plotly."""

import math
from pathlib import Path
from typing import Any

from flatkern.landscape.surfaces import Surface

_COLORS = "Viridis"


def html_surfaces(
    surfaces: dict[str, Surface],
    path: Path,
    title: str | None,
    log: bool,
    ends: tuple[float, float],
) -> Path:
    """Write them side by side, on one scale; lines in one picture. Needs no network to be read.

    Raises:
        ImportError: plotly is missing.
        OSError: the path cannot be written.
    """
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        hint = "pip install 'flatkern[plot]'"
        raise ImportError(f"plot_surface: an .html needs plotly ({hint})") from error
    if next(iter(surfaces.values())).loss.dim() == 1:
        figure = graph_objects.Figure()
        for name, surface in surfaces.items():
            line = {"x": surface.coordinates.tolist(), "y": _rows(surface.loss, False)}
            figure.add_trace(graph_objects.Scatter(**line, name=name or "loss"))
        axis = {"type": "log"} if log else {}
        figure.update_layout(xaxis_title="along V1", yaxis={"title": "loss", **axis})
    else:
        figure = make_subplots(
            cols=len(surfaces), specs=[[{"type": "surface"}] * len(surfaces)],
            subplot_titles=[*surfaces],
        )  # fmt: skip
        low, high = map(math.log10, ends) if log else ends
        for column, surface in enumerate(surfaces.values(), 1):
            trace = graph_objects.Surface(
                x=surface.coordinates.tolist(),
                y=surface.coordinates.tolist(),
                z=_rows(surface.loss, log),
                colorscale=_COLORS,
                cmin=low,
                cmax=high,
                showscale=column == len(surfaces),
                colorbar={"title": "log10 loss" if log else "loss"},
                hovertemplate="V1 %{x:.3g}<br>V2 %{y:.3g}<br>loss %{z:.5g}<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=column)
        figure.update_scenes(
            xaxis_title="along V1",
            yaxis_title="along V2",
            zaxis={"title": "log10 loss" if log else "loss", "range": [low, high]},
        )
    figure.update_layout(title=title, template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)
    return path


def _rows(loss: Any, log: bool) -> list:
    """Rows for V2; None where it is not finite."""
    if loss.dim() > 1:
        return [_rows(row, log) for row in loss.T]
    values = loss.tolist()
    return [(math.log10(v) if log else v) if math.isfinite(v) else None for v in values]
