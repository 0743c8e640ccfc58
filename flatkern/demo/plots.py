"""The demo's two pictures: loss against noise radius, and the training curves."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flatkern.demo.data import IN_DOMAIN
from flatkern.demo.experiment import CURVE_SENTENCES, RADII, Run
from flatkern.demo.report import grouped

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles and markers
# repeat the distinction for print.
STYLES = {
    "LoRA": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "Flat-LoRA": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "LoRA + dropout": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
}
# Of other arms, in order: ten colours, then the same dashed.
OTHERS = [
    {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10], "marker": "."}
    for number in range(20)
]
WIDTH, HEIGHT, DPI = 4.6, 3.4, 130  # of one panel, in inches


def plot_radius(runs: list[Run], path: Path) -> None:
    """Train loss against noise radius; one panel per setting."""
    settings, figure, axes = _panels(runs, rows=1)
    few = _few(runs)
    for setting, axis in zip(settings, axes[0], strict=True):
        for (name, arm), group in grouped(runs).items():
            if name == setting:
                by_radius = zip(*(run.radius_loss for run in group), strict=True)
                values = [np.concatenate(draws) for draws in by_radius]
                _line(axis, arm, RADII, values, few)
        axis.set_title(f"{setting}, {_epochs(runs, setting)} epochs")
        axis.set_xlabel(r"noise radius $\sigma$ (length of noise row / weight row)")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("train loss under noise (nats)")
    _legend(figure, axes[0][0], few, f"{_seeds(runs)}, draws: {len(runs[0].radius_loss[-1])}")
    save(figure, path)


def plot_curves(runs: list[Run], path: Path) -> None:
    """Train loss and test accuracy against the epoch; one column per setting."""
    settings, figure, axes = _panels(runs, rows=2)
    few = _few(runs)
    for column, setting in enumerate(settings):
        loss, accuracy = axes[0][column], axes[1][column]
        for (name, arm), group in grouped(runs).items():
            if name == setting:
                epochs = group[0].curve_epoch
                losses = np.array([run.curve_train_loss for run in group]).T
                accuracies = np.array([run.curve_accuracy for run in group]).T
                _line(loss, arm, epochs, losses, few)
                _line(accuracy, arm, epochs, accuracies, few)
        loss.set_title(setting)
        loss.set_ylim(bottom=0)
        accuracy.set_xlabel("epoch")
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("train loss without noise (nats)")
    axes[1][0].set_ylabel(f"accuracy on {CURVE_SENTENCES} test {IN_DOMAIN} (%)")
    _legend(figure, axes[0][0], few, _seeds(runs))
    save(figure, path)


def _panels(runs: list[Run], rows: int) -> tuple[list[str], Figure, np.ndarray]:
    """Setting names, and a grid of axes [rows, settings] whose rows share their y axis."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    figure = Figure(figsize=(WIDTH * len(settings), HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, len(settings), squeeze=False, sharey="row", sharex="col")
    return settings, figure, axes


def _line(
    axis: Axes, arm: str, x: list[float], values: np.ndarray | list[np.ndarray], band: bool
) -> None:
    """Mean of values [point][sample], with a band of one standard deviation if asked for."""
    mean = np.array([np.mean(samples) for samples in values])
    deviation = np.array([np.std(samples, ddof=1) if len(samples) > 1 else 0 for samples in values])
    style = STYLES.get(arm) or OTHERS[len(axis.lines) % len(OTHERS)]
    axis.plot(x, mean, label=arm, markersize=4, linewidth=1.6, **style)
    if band:
        low, high = mean - deviation, mean + deviation
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def _few(runs: list[Run]) -> bool:
    """Whether bands and a legend inside leave the lines to be seen."""
    return len({run.recipe.arm for run in runs}) <= len(STYLES)


def _legend(figure: Figure, axis: Axes, few: bool, samples: str) -> None:
    options = {"frameon": False, "alignment": "left"}
    if few:
        axis.legend(title=f"mean ± sd: {samples}", **options)
    else:
        title = f"mean: {samples}"
        handles = axis.get_legend_handles_labels()
        figure.legend(*handles, title=title, loc="outside right upper", fontsize="small", **options)


def _seeds(runs: list[Run]) -> str:
    count = len({run.seed for run in runs})
    return f"{count} seed" + ("s" if count > 1 else "")


def _epochs(runs: list[Run], setting: str) -> int:
    return next(run.curve_epoch[-1] for run in runs if run.setting == setting)


def save(figure: Figure, path: Path) -> None:
    """Write a picture with a quiet grid and without a frame."""
    for axis in figure.axes:
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
