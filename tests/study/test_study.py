"""flatkern study on a tiny model and made-up examples: cells, resuming, statistics, words."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("pandas", reason="the study's extras are not installed")
pytest.importorskip("sklearn", reason="the study's extras are not installed")
pytest.importorskip("statsmodels", reason="the study's extras are not installed")
pytest.importorskip("matplotlib", reason="the study's extras are not installed")
pytest.importorskip("peft", reason="the study's extras are not installed")

import pandas as pd
import scipy.stats

from flatkern import cli
from flatkern.demo import data
from flatkern.study import StudyError, arms, corrupt, statistics, tasks, train
from flatkern.study.arms import FLAT, PLAIN, STOPPED, Cell
from flatkern.study.store import Store

CLASSES, FEATURES = 5, 24


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 20), nn.GELU(), nn.Linear(20, 18))
        self.head = nn.Linear(18, CLASSES)

    def forward(self, pixels):
        return self.head(self.encoder(pixels))


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, FEATURES, generator=generator)
    return tasks.Images(pixels + 2 * nn.functional.one_hot(labels, FEATURES), labels)


@pytest.fixture
def tiny(monkeypatch, threads):
    threads(1)
    names = ["test", "other: far", *(f"noise {severity}" for severity in corrupt.SEVERITIES)]
    task = tasks.Task(
        fresh=Tiny,
        validation=examples(30, 1),
        held_out=examples(20, 2),
        tests={name: examples(40, 3 + place) for place, name in enumerate(names)},
        train=lambda seed, flipped: examples(64, 100 + seed),
        epochs=dict.fromkeys(arms.LABELS, 2),
    )
    monkeypatch.setattr(tasks, "load", lambda name, quick: task)
    return task


def first_of_each():
    """Of every kind of arm one value."""
    return list({arm.name: arm for arm in reversed(arms.all_arms())}.values())


@pytest.mark.parametrize("arm", first_of_each(), ids=lambda arm: arm.name)
def test_every_arm_trains_and_leaves_frozen_weights(tiny, arm):
    rows = train.run(Cell("vision", "clean", 0, arm), quick=True)
    assert [row["arm"] for row in rows] == [arm.name] + [STOPPED] * (arm.name == PLAIN)
    for row in rows:
        assert row["weights_changed"] == 0
        assert json.loads(json.dumps(row)) == row
        # What is reported can be computed again from the predictions.
        found = train.unpack(row["predictions"]["test"])
        right = 100 * (found == tiny.tests["test"].labels.numpy()).mean()
        assert row["tests"]["test"]["accuracy"] == pytest.approx(right, abs=1e-3)


def test_options_reach_the_methods(tiny):
    """Arms of one method that differ in an option end elsewhere, and a run again ends the same."""
    some = [arm for arm in arms.all_arms() if arm.name.startswith((FLAT, "RWP", "SAM"))]
    losses = []
    for arm in (*some, some[0]):
        (row,) = train.run(Cell("vision", "clean", 0, arm), quick=True)
        losses.append(row["tests"]["test"]["loss"] + row["flatness"]["ascent"])
    assert losses.pop() == losses[0]
    assert len(set(losses)) == len(some)


def study(tmp_path, *more):
    return cli.main(["study", "--quick", "--task", "vision", "--out", str(tmp_path), *more])


def test_a_study_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    run = train.run

    def interrupted(cell, quick):
        if cell.seed == 1 and cell.arm.name == FLAT:
            raise KeyboardInterrupt
        return run(cell, quick)

    monkeypatch.setattr(train, "run", interrupted)
    assert study(tmp_path) == 130
    assert "goes on from there" in capsys.readouterr().err
    path = tmp_path / "cells.jsonl"
    done = path.read_text()
    with path.open("a") as file:
        file.write('{"key": "half a li')
    again = []
    monkeypatch.setattr(train, "run", lambda cell, quick: again.append(cell) or run(cell, quick))
    assert study(tmp_path) == 0
    assert path.read_text().startswith(done)
    assert all(cell.seed == 1 and cell.arm.name in (FLAT, "SAM (W)") for cell in again)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("cells.jsonl", "study.md", "comparisons.json"),
        *("sigma.png", "corruption.png", "flatness.png"),
    }
    out = capsys.readouterr().out
    assert STOPPED in out
    monkeypatch.setattr(train, "run", None)
    assert study(tmp_path, "--report") == 0


@pytest.mark.parametrize("arm", [PLAIN, "SAM (W)"])
def test_the_order_has_the_main_arms_first_and_every_cell_once(arm):
    cells = list(arms.cells(arms.all_arms(), list(arms.TASKS), list(arms.LABELS), 3))
    assert len({cell.key for cell in cells}) == len(cells)
    kinds = [cell.arm.name in arms.MAIN for cell in cells]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(cell.arm.name == arm for cell in cells) == 12 * (1 + (arm != PLAIN))


def test_a_study_of_other_conditions_is_refused(tmp_path):
    Store(tmp_path, {"quick": True})
    with pytest.raises(StudyError, match="other conditions"):
        Store(tmp_path, {"quick": False})
    (tmp_path / "cells.jsonl").write_text("no JSON\n")
    with pytest.raises(StudyError, match="no file of a study"):
        Store(tmp_path, {"quick": True})
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="--out"):
        Store(tmp_path / "file", {})


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "STUDY_MODULES", ("no_such_module",))
    assert cli.main(["study"]) == 2
    assert 'pip install "flatkern[study]"' in capsys.readouterr().err


def frame(**accuracies):
    """Cells of arms by name: a list of (value, test accuracies by seed, validation)."""
    rows = []
    for arm, values in accuracies.items():
        for value, tests, validation in values:
            for seed, accuracy in enumerate(tests):
                rows.append(
                    {
                        "task": "t",
                        "labels": "l",
                        "arm": arm,
                        "value": value,
                        "seed": seed,
                        **dict.fromkeys(("accuracy", "other", "corrupted"), accuracy),
                        "validation": validation,
                    }
                )
    return pd.DataFrame(rows)


def test_validation_chooses_and_the_test_set_does_not():
    cells = frame(X=[("a", [90, 90, 90], 50), ("b", [10, 20, 30], 60), ("c", [99, 99], 60)])
    chosen = statistics.by_validation(cells)
    assert set(chosen["value"]) == {"b"}
    # Only two seeds have every value.
    assert sorted(chosen["accuracy"]) == [10, 20]


def test_paired_tests_with_holms_correction():
    base = [60.0, 62.0, 61.0, 64.0]
    better = [63.0, 64.0, 65.0, 66.0]
    other = [60.5, 61.0, 62.0, 64.5]
    constant = [x + 1 for x in base]
    cells = frame(
        **{PLAIN: [("", base, 1)], "A": [("", better, 1)], "B": [("", other, 1)]},
        C=[("", constant, 1)],
    )
    found = {one.arm: one for one in statistics.compare(cells) if one.metric == "accuracy"}
    raw = {}
    for arm, values in (("A", better), ("B", other)):
        differences = np.subtract(values, base)
        t = differences.mean() / (differences.std(ddof=1) / 2)
        raw[arm] = 2 * scipy.stats.t.sf(abs(t), 3)
        half = scipy.stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
        one = found[arm]
        assert one.p == pytest.approx(raw[arm])
        assert (one.low, one.high) == pytest.approx(
            (differences.mean() - half, differences.mean() + half)
        )
    # Six tests: three metrics are alike, C is not tested.
    assert found["A"].p_holm == pytest.approx(min(1, 6 * raw["A"]))
    assert found["B"].p_holm == pytest.approx(min(1, max(6 * raw["A"], 3 * raw["B"])))
    assert np.isnan(found["C"].p)
    assert found["C"].difference == 1


def test_correlations_are_within_seeds():
    rows = []
    for seed, shift in ((0, 0.0), (1, 100.0)):
        for x in (1.0, 2.0, 3.0):
            results = dict.fromkeys(("accuracy", "other", "corrupted"), shift - x)
            flatness = dict.fromkeys(("flat_average", "flat_sampled", "flat_ascent"), x)
            rows.append(
                {"task": "t", "labels": "l", "seed": seed, "loss": x, **results, **flatness}
            )
    table = statistics.correlations(pd.DataFrame(rows))
    assert table["accuracy"].tolist() == pytest.approx([-1] * 3)
    assert table["loss"].tolist() == pytest.approx([1] * 3)


def test_flips_are_exact_and_to_other_classes():
    labels = np.arange(200) % 5
    given = data.flip(labels, 0.3, np.random.default_rng(0), 5)
    assert (given != labels).sum() == 60
    assert set(given) == set(range(5))
    assert (data.flip(labels, 0.0, np.random.default_rng(0), 5) == labels).all()


SENTENCES = ["A surprisingly good film, with a heart of its own."] * 50


@pytest.mark.parametrize("kind", corrupt.TEXT_KINDS)
def test_texts_are_damaged_more_and_more(kind):
    damaged = [corrupt.texts(SENTENCES, kind, severity, 7) for severity in corrupt.SEVERITIES]
    assert damaged[0] == corrupt.texts(SENTENCES, kind, 1, 7)

    def changed(texts):
        pairs = zip(texts, SENTENCES, strict=True)
        return sum(abs(len(a) - len(b)) + sum(map(str.__ne__, a, b)) for a, b in pairs)

    assert 0 < changed(damaged[0]) < changed(damaged[1]) < changed(damaged[2])
    for text in damaged[2]:
        if kind == "case":
            assert text.lower() == SENTENCES[0].lower()
        elif kind == "spacing":
            assert text.replace(" ", "") == SENTENCES[0].replace(" ", "")
        elif kind == "unicode":
            assert len(unicodedata.normalize("NFC", text)) >= len(SENTENCES[0])
            assert text.count(" ") == SENTENCES[0].count(" ")


@pytest.mark.parametrize("kind", corrupt.IMAGE_KINDS)
def test_images_are_damaged_more_and_more(kind):
    pixels = np.zeros((6, 28, 28), np.float32)
    pixels[:, 6:22, 9:15] = 1
    damaged = [corrupt.images(pixels, kind, severity, 7) for severity in corrupt.SEVERITIES]
    assert all(one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1 for one in damaged)
    distances = [float(np.abs(one - pixels).mean()) for one in damaged]
    assert 0 < distances[0] < distances[1] < distances[2]
    np.testing.assert_array_equal(damaged[0], corrupt.images(pixels, kind, 1, 7))
