"""The study's words, tables and pictures."""

import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

import flatkern
from flatkern.demo.plots import save
from flatkern.demo.report import spread
from flatkern.study import statistics
from flatkern.study.arms import FLAT, MAIN, PLAIN, STOPPED
from flatkern.study.corrupt import IMAGE_KINDS, SEVERITIES, TEXT_KINDS
from flatkern.study.store import Store
from flatkern.study.train import FLATNESS

_MAIN = (*MAIN, STOPPED)
# Okabe and Ito's colours.
_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00")


def write(
    folder: Path, store: Store, conditions: dict[str, Any], command: str
) -> tuple[list[Path], str]:
    """study.md, comparisons.json and pictures; returns their paths, and the main table."""
    rows = list(store.rows.values())
    cells = statistics.frame(rows)
    chosen = statistics.by_validation(cells)
    comparisons = statistics.compare(chosen)
    severities = _severities(rows, chosen)
    paths = [folder / "study.md", folder / "comparisons.json"]
    paths[0].write_text(_page(cells, chosen, comparisons, severities, conditions, command))
    record = [dataclasses.asdict(one) for one in comparisons]
    paths[1].write_text(json.dumps(record, indent=1) + "\n")
    for name, draw in (
        ("sigma.png", lambda axis, *key: _draw_sigma(axis, cells, *key)),
        ("corruption.png", lambda axis, *key: _draw_severity(axis, severities, *key)),
        ("flatness.png", lambda axis, *key: _draw_flatness(axis, cells, *key)),
    ):
        paths.append(_panels(folder / name, cells, draw))
    return paths, _main(chosen, comparisons, "simple")


def _page(
    cells: pd.DataFrame,
    chosen: pd.DataFrame,
    comparisons: list[statistics.Comparison],
    severities: pd.DataFrame,
    conditions: dict[str, Any],
    command: str,
) -> str:
    seeds = cells.groupby(["task", "labels"], sort=False)["seed"].nunique()
    counted = ", ".join(f"{task}, {labels}: {n}" for (task, labels), n in seeds.items())
    parts = [
        f"# {command}",
        f"{len(cells)} cells, {cells['seconds'].sum() / 3600:.1f} hours of one core. Seeds: "
        f"{counted}. flatkern {flatkern.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, one thread a cell. Sizes: "
        f"{json.dumps(conditions)}.",
        "Accuracies and macro F1 in percent, mean ± standard deviation over seeds. The value of an "
        "arm is the one with the best mean validation accuracy (true labels); the test sets were "
        f"not read. Flatness: mean rise of the held-out loss around merged weights, {FLATNESS}. "
        "vs LoRA: paired by seed, percentage points with 95 % t-intervals; p after Holm's "
        f"correction over all {len(comparisons)} comparisons. Frozen weights that changed: "
        f"{cells['changed'].sum()}.",
        "## Arms, each at the value that validation chose",
        _main(chosen, comparisons, "github"),
        "## Other adapters and ranks: Flat-X against X",
        _against(comparisons, "github"),
        "## Strength: Flat-LoRA (W)",
        _sweep(cells),
        "## Damaged test sets, by severity",
        _severity_table(severities),
        "## Flatness and generalisation",
        "Spearman's rank correlation over all cells of a task and labelling, each less its seed's "
        "mean. Flat is good if a rise goes with lower accuracy (negative) and a higher loss "
        "(positive).",
        _github(statistics.correlations(cells)),
    ]
    return "\n\n".join(parts) + "\n"


def _github(table: pd.DataFrame, digits: str = ".2f") -> str:
    return tabulate(table, headers="keys", tablefmt="github", showindex=False, floatfmt=digits)


def _spread(values: pd.Series, digits: int = 1) -> str:
    return spread(list(values), digits)


def _main(chosen: pd.DataFrame, comparisons: list[statistics.Comparison], form: str) -> str:
    against = {
        (one.task, one.labels, one.arm): one
        for one in comparisons
        if one.against == PLAIN and one.metric == "accuracy"
    }
    rows = []
    for (task, labels, arm), group in chosen.groupby(["task", "labels", "arm"], sort=False):
        one = against.get((task, labels, arm))
        rows.append(
            {
                "task": f"{task}, {labels}",
                "arm": arm,
                "value": group["value"].iloc[0],
                "validation": _spread(group["validation"]),
                "test": _spread(group["accuracy"]),
                "vs LoRA": "" if one is None else _interval(one),
                "p": "" if one is None else _p(one),
                "F1": _spread(group["f1"]),
                "other domains": _spread(group["other"]),
                "corrupted": _spread(group["corrupted"]),
                "test loss": _spread(group["loss"], 2),
                "train - test": f"{group['gap'].mean():.1f}",
                "flatness": f"{group['flat_average'].mean():.3f}",
                "by ascent": f"{group['flat_ascent'].mean():.2f}",
            }
        )
    return tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)


def _p(one: statistics.Comparison) -> str:
    return "" if math.isnan(one.p) else f"{one.p_holm:.2f}"


def _interval(one: statistics.Comparison) -> str:
    return f"{one.difference:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"


def _against(comparisons: list[statistics.Comparison], form: str) -> str:
    rows = [
        {
            "task": f"{one.task}, {one.labels}",
            "arm": f"{one.arm} {one.value}".strip(),
            "against": one.against,
            "on": statistics.METRICS[one.metric],
            "difference": _interval(one),
            "p": _p(one),
        }
        for one in comparisons
        if one.against != PLAIN
    ]
    if not rows:
        return "No pair has two seeds yet."
    return tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)


def _sigmas(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of Flat-LoRA (W), and of LoRA as sigma 0."""
    some = cells[cells["arm"].isin([PLAIN, FLAT])].copy()
    some["sigma"] = some["value"].str.removeprefix("sigma=").replace("", "0").astype(float)
    return some.sort_values("sigma")


def _sweep(cells: pd.DataFrame) -> str:
    rows = [
        {
            "task": f"{task}, {labels}",
            "sigma": sigma,
            "validation": _spread(group["validation"]),
            "test": _spread(group["accuracy"]),
            "other domains": _spread(group["other"]),
            "corrupted": _spread(group["corrupted"]),
            "test loss": _spread(group["loss"], 2),
            "flatness": f"{group['flat_average'].mean():.3f}",
        }
        for (task, labels, sigma), group in _sigmas(cells).groupby(["task", "labels", "sigma"])
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _severities(rows: list[dict[str, Any]], chosen: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by kind and severity, of the main arms at their chosen values."""
    keys = ["task", "labels", "seed", "arm", "value"]
    wanted = set(chosen[chosen["arm"].isin(_MAIN)][keys].itertuples(index=False, name=None))
    found = []
    for row in rows:
        if tuple(row[key] for key in keys) in wanted:
            for kind in (*TEXT_KINDS, *IMAGE_KINDS):
                for severity in SEVERITIES:
                    if (test := row["tests"].get(f"{kind} {severity}")) is not None:
                        own = {"kind": kind, "severity": severity, "accuracy": test["accuracy"]}
                        found.append({key: row[key] for key in keys} | own)
    return pd.DataFrame(found)


def _severity_table(table: pd.DataFrame) -> str:
    if table.empty:
        return "No cells yet."
    wide = table.pivot_table(
        index=["task", "labels", "arm"], columns=["kind", "severity"], values="accuracy", sort=False
    )
    parts = []
    for task, own in wide.groupby(level="task", sort=False):
        own = own.dropna(axis=1).round(1)
        own.columns = [f"{kind} {severity}" for kind, severity in own.columns]
        parts.append(_github(own.reset_index().assign(task=task), ".1f"))
    return "\n\n".join(parts)


def _panels(path: Path, cells: pd.DataFrame, draw: Any) -> Path:
    """One panel for each task and labelling."""
    keys = list(cells.groupby(["task", "labels"], sort=False).groups)
    figure = Figure(figsize=(4.4 * len(keys), 3.5), layout="constrained")
    axes = figure.subplots(1, len(keys), squeeze=False)[0]
    for axis, (task, labels) in zip(axes, keys, strict=True):
        draw(axis, task, labels)
        axis.set_title(f"{task}, {labels}")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)
    return path


def _of(table: pd.DataFrame, task: str, labels: str) -> pd.DataFrame:
    return table[(table["task"] == task) & (table["labels"] == labels)]


def _draw_sigma(axis: Axes, cells: pd.DataFrame, task: str, labels: str) -> None:
    own = _of(_sigmas(cells), task, labels).groupby("sigma")
    shown = (("accuracy", "test"), ("other", "other domains"), ("corrupted", "corrupted"))
    for (column, label), color in zip(shown, _COLORS, strict=False):
        mean, deviation = own[column].mean(), own[column].std().fillna(0)
        axis.plot(mean.index, mean, marker="o", markersize=4, color=color, label=label)
        axis.fill_between(
            mean.index, mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0
        )
    axis.set_xlabel(r"$\sigma$ of Flat-LoRA (0: LoRA)")
    axis.set_ylabel("accuracy (%)")


def _draw_severity(axis: Axes, table: pd.DataFrame, task: str, labels: str) -> None:
    own = _of(table, task, labels)
    for arm, color in zip(_MAIN, _COLORS, strict=True):
        mean = own[own["arm"] == arm].groupby("severity")["accuracy"].mean()
        axis.plot(mean.index, mean, marker="o", markersize=4, color=color, label=arm)
    axis.set_xticks(SEVERITIES)
    axis.set_xlabel("severity, mean over kinds of damage")
    axis.set_ylabel("accuracy (%)")


def _draw_flatness(axis: Axes, cells: pd.DataFrame, task: str, labels: str) -> None:
    own = _of(cells, task, labels)
    for arm, color in zip(_MAIN, _COLORS, strict=True):
        some = own[own["arm"] == arm]
        axis.scatter(some["flat_average"], some["loss"], s=14, color=color, label=arm, zorder=3)
    rest = own[~own["arm"].isin(_MAIN)]
    axis.scatter(rest["flat_average"], rest["loss"], s=6, color="0.7", label="other arms")
    axis.set_xlabel("mean rise of held-out loss")
    axis.set_ylabel("test loss (nats)")
