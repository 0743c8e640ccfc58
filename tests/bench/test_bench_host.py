"""bench.host: every arm runs, and the table names it."""

from pathlib import Path

import pytest

if not (Path(__file__).parents[2] / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)

from bench import host, host_windows


def test_layers():
    pytest.importorskip("peft")
    outcomes = [*host.layers(rounds=1, calls=1)]
    # Five arms; those in windows again in three panels.
    assert len(outcomes) == 7
    assert all(outcome.microseconds > 0 and outcome.ratio > 0 for outcome in outcomes)
    table = host.table(outcomes)
    assert table.count("virtual window") == 4
    assert table.count("three panels") == 2


def test_windows():
    row = host_windows.measure(2, 8, rounds=1)
    assert min(row.forward_backward, row.virtual, row.inplace) > 0
    (line,) = host_windows.table([row]).splitlines()[2:]
    ratio = float(line.split("|")[5])
    assert abs(ratio - row.virtual / row.forward_backward) < 1e-3
