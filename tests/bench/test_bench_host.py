"""bench.host: every arm runs, and the table names it."""

from pathlib import Path

import pytest

if not (Path(__file__).parents[2] / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)

from bench import host


def test_layers():
    pytest.importorskip("peft")
    outcomes = [*host.layers(rounds=1, calls=1)]
    # Five arms; those in windows again in three panels.
    assert len(outcomes) == 7
    assert all(outcome.microseconds > 0 and outcome.ratio > 0 for outcome in outcomes)
    table = host.table(outcomes)
    assert table.count("virtual window") == 4
    assert table.count("three panels") == 2
