"""From cells to comparisons: the value that validation chooses, paired tests, correlations."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from flatkern.study.arms import FLAT, KINDS, LABELS, PLAIN, STOPPED, all_arms

CONFIDENCE = 0.95
METRICS = {"accuracy": "test", "other": "other domains", "corrupted": "corrupted test"}


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell: accuracies and F1 in percent, losses in nats, rises of the loss."""
    order = {arm.name: place for place, arm in enumerate(all_arms())} | {STOPPED: 2.5}
    table = pd.DataFrame([_flat(row) for row in rows])
    keys = [table["task"], table["labels"].map([*LABELS].index), table["arm"].map(order)]
    return table.iloc[np.lexsort([table["seed"], *reversed(keys)])]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    tests = row["tests"]
    other = [found["accuracy"] for name, found in tests.items() if name.startswith("other: ")]
    damaged = [found["accuracy"] for name, found in tests.items() if name[-1].isdigit()]
    return {
        **{name: row[name] for name in ("task", "labels", "seed", "arm", "value", "seconds")},
        "validation": row["validation"]["accuracy"],
        "accuracy": tests["test"]["accuracy"],
        "f1": tests["test"]["f1"],
        "loss": tests["test"]["loss"],
        "other": np.mean(other),
        "corrupted": np.mean(damaged),
        "gap": row["train"]["accuracy"] - tests["test"]["accuracy"],
        **{f"flat_{name}": row["flatness"][name] for name in ("average", "sampled", "ascent")},
        "changed": row["weights_changed"],
    }


def by_validation(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of each arm's value that has the best mean validation accuracy.

    Of values that are equally good the first, and of seeds those that every value has.
    """
    keys = ["task", "labels", "arm"]
    kept = []
    for _, group in cells.groupby(keys, sort=False):
        table = group.pivot(index="seed", columns="value", values="validation")
        table = table[group["value"].drop_duplicates()].dropna()
        if len(table):
            best = table.mean().idxmax()
            kept.append(group[(group["value"] == best) & group["seed"].isin(table.index)])
    return pd.concat(kept) if kept else cells.iloc[:0]


@dataclass(frozen=True)
class Comparison:
    """The mean difference of an arm to another, paired by seed; in percentage points."""

    task: str
    labels: str
    metric: str
    arm: str
    value: str
    against: str
    seeds: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")


def compare(chosen: pd.DataFrame) -> list[Comparison]:
    """Every arm against LoRA, and Flat-X against X, with Holm's correction over all of them.

    Paired t-tests over at least two seeds. p is NaN where every seed has the same difference, which
    a t-test says nothing of; such a pair is left out of the correction.
    """
    found = []
    for (task, labels), group in chosen.groupby(["task", "labels"], sort=False):
        names = list(group["arm"].drop_duplicates())
        pairs = [(name, PLAIN) for name in names if name != PLAIN]
        pairs += [(f"Flat-{kind}", kind) for kind in KINDS]
        pairs += [
            (name, name.replace(FLAT, PLAIN)) for name in names if name.startswith(f"{FLAT}, ")
        ]
        for arm, against in pairs:
            for metric in METRICS:
                if (one := _paired(group, arm, against, metric)) is not None:
                    value = group.loc[group["arm"] == arm, "value"].iloc[0]
                    found.append(Comparison(task, labels, metric, arm, value, against, *one))
    tested = [place for place, one in enumerate(found) if not np.isnan(one.p)]
    if tested:
        corrected = multipletests([found[place].p for place in tested], method="holm")[1]
        for place, p in zip(tested, corrected, strict=True):
            found[place] = replace(found[place], p_holm=float(p))
    return found


def _paired(
    group: pd.DataFrame, arm: str, against: str, metric: str
) -> tuple[int, float, float, float, float] | None:
    columns = [
        group[group["arm"] == name].set_index("seed")[metric].rename(name)
        for name in (arm, against)
    ]
    table = pd.concat(columns, axis=1, join="inner")
    if len(table) < 2:
        return None
    differences = table[arm] - table[against]
    if differences.std() < 1e-9:
        mean = float(differences.mean())
        return len(table), mean, mean, mean, float("nan")
    test = stats.ttest_rel(table[arm], table[against])
    interval = test.confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    return len(table), float(differences.mean()), low, high, float(test.pvalue)


def correlations(cells: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each flatness with each result, over cells of one labelling.

    Values are taken less their seed's mean, because seeds differ in their training sentences.
    """
    rows = []
    for (task, labels), group in cells.groupby(["task", "labels"], sort=False):
        for flatness in ("flat_average", "flat_sampled", "flat_ascent"):
            row = {"task": task, "labels": labels, "flatness": flatness.removeprefix("flat_")}
            for result in ("accuracy", "other", "corrupted", "loss"):
                centred = [
                    group[name] - group.groupby("seed")[name].transform("mean")
                    for name in (flatness, result)
                ]
                varies = all(np.ptp(values) > 0 for values in centred)
                row[result] = stats.spearmanr(*centred).statistic if varies else np.nan
            rows.append(row | {"cells": len(group)})
    return pd.DataFrame(rows)
