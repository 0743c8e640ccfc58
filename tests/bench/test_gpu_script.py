"""bench/gpu.py without a GPU: the rehearsal, and what its tables make of outcomes."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)
pytest.importorskip("tabulate")

from bench import gpu, gpu_table, step  # noqa: E402
from bench.gpu_ops import Cell, plan  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3"


def files():
    kept = [path for path in (ROOT / "bench").rglob("*") if "__pycache__" not in path.parts]
    return sorted((path, path.stat().st_mtime_ns) for path in kept if path.is_file())


def test_rehearsal():
    before = files()
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("REHEARSAL, no GPU\n")
    assert run.stdout.rstrip().endswith("nothing was measured, nothing was kept")
    assert files() == before
    table = run.stdout[run.stdout.index("## Ops") :]
    for cell in plan(rehearse=True):
        assert cell.op.split()[0] in table
    ops, linear, claims, *scripts, tests, parts = table.split("\n## ")
    for line in ops.splitlines()[4:]:
        columns = [column.strip() for column in line.split("|")[1:-1]]
        # Predictions apart, nothing but names and what was not run.
        assert set(columns[5:]) <= {"not run", ""}, line
    assert "not run" in linear
    assert [script.splitlines()[2:] for script in scripts] == [["not run"]] * 3
    assert "tests/noise/test_schedules" in tests
    assert "| tests " in parts
    for name, (_, _, needed) in gpu.SCRIPTS.items():
        assert row(parts, name)[0] == ("ok" if all(map(find_spec, needed)) else "not run")
    assert "failed" not in claims + parts.replace("0 failed", "")


def test_a_rehearsal_is_the_only_way_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def outcomes(seconds):
    """Every cell of a complete run, all of them equally fast but for a copy twice as slow."""
    factor = {"copy": 2, "published": 10}
    return {
        cell: {"status": "ok", "seconds": seconds * factor.get(cell.provider, 1)}
        for cell in plan(rehearse=False)
    }


def row(table, *start):
    for line in table.splitlines():
        columns = [column.strip() for column in line.split("|")[1:-1]]
        if columns[: len(start)] == list(start):
            return columns[len(start) :]
    raise AssertionError(f"no row {start} in\n{table}")


def test_ops_beside_their_predictions():
    table = gpu_table.ops_table(outcomes(30e-6), H100)
    # 2 x 2 bytes x 4096^2 over 3.0 TB/s; a copy takes 60 us.
    got = row(table, "perturb", "4096x4096", "bfloat16")
    assert got == ["22.4", "90 %", "30.0", "200%", "30.0", "200%", "10.0x", "1.0x", "1.0x"]
    # Reads half of what the copy moves.
    got = row(table, "row_norm", "11008x4096", "bfloat16")
    assert got[:4] == ["30.1", "90 %", "30.0", "100%"]
    assert row(gpu_table.ops_table(outcomes(1.0), "NVIDIA H200"), "perturb")[2] == "15.6"
    assert row(gpu_table.ops_table(outcomes(1.0), "another"), "perturb")[2] == "none"


def test_failed_cells_hold_no_number():
    results = outcomes(30e-6)
    broken = Cell("perturb", 4096, 4096, "bfloat16", "cuda")
    results[broken] = {"status": "failed", "why": "gate: wrong"}
    got = row(gpu_table.ops_table(results, H100), "perturb", "4096x4096", "bfloat16")
    assert got[2:6] == ["failed", "", "30.0", "200%"]
    claims = gpu_table.claims_table(results, H100)
    assert row(claims, "perturb: triton over cuda")[1] == "failed"
    assert row(claims, "triton: perturb_merged over perturb") == ["1.5", "1.00"]
    assert row(claims, "device copy, TB/s") == ["3.0", "1.12"]
    several = "cuda: foreach_perturb_ of 48 weights 512x512 over a loop"
    assert row(claims, several) == ["0.2 to 0.5", "1.00"]


def test_noisy_linear_beside_its_predictions():
    results = outcomes(30e-6)
    slow = Cell("noisy_linear backward", 11008, 4096, "bfloat16", "triton", 512)
    results[slow] = {"status": "ok", "seconds": 60e-6}
    got = row(gpu_table.linear_table(results), "11008x4096", "512", "backward")
    assert got[3:] == ["+0%", "+100%"]


def test_judges(tmp_path):
    assert gpu.by_exit_status(0, "") == ("ok", "")
    assert gpu.by_exit_status(3, "one\nlast words\n") == ("failed", "exit 3: last words")
    assert gpu.by_sanitizer(0, "========= ERROR SUMMARY: 0 errors")[0] == "ok"
    assert gpu.by_sanitizer(9, "========= ERROR SUMMARY: 2 errors") == ("failed", "2 errors")
    assert gpu.by_sanitizer(0, "Device not supported")[0] == "failed"
    hazards = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert gpu.by_sanitizer(0, hazards)[0] == "failed"
    report = tmp_path / "tests.xml"
    assert gpu.by_junit(report)(1, "crashed") == ("failed", "exit 1: crashed")
    report.write_text(
        '<testsuite><testcase classname="a.b" name="b"/><testcase classname="a.b" name="c">'
        '<failure>E  why</failure></testcase><testcase classname="d"><skipped/></testcase>'
        "</testsuite>"
    )
    tests = gpu.Tests.read(report)
    assert row(gpu_table.tests_table(tests.by_file), "a/b") == ["1", "1", "0"]
    assert row(gpu_table.tests_table(tests.by_file), "d") == ["0", "0", "1"]
    assert tests.tracebacks() == "a/b::c\nE  why\n"
    assert gpu.by_junit(report)(1, "") == ("failed", "1 passed, 1 failed, 1 skipped")


def test_parts_are_named_whatever_becomes_of_them(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 1)
    parts = gpu.Parts(seconds=60)
    parts.run("fails", [sys.executable, "-c", "print('why'); raise SystemExit(4)"], 60)
    parts.run("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    parts.run("is absent", ["/no/such/program"], 60)
    parts.run("works", [sys.executable, "-c", ""], 60)
    gpu.Parts.run(late := gpu.Parts(seconds=0.5), "late", ["true"], 60)
    got = {part["name"]: (part["status"], part["detail"]) for part in parts.done + late.done}
    assert got["fails"] == ("failed", "exit 4: why")
    assert got["hangs"] == ("failed", "stopped after 1 s")
    assert got["is absent"][0] == "failed"
    assert got["works"] == ("ok", "")
    assert got["late"] == ("not run", "no time left")


def test_a_rehearsed_benchmark_that_fails(monkeypatch):
    monkeypatch.setattr(step, "main", lambda: print(sys.argv[1:]) or 1 / 0)
    parts, before = gpu.Parts(seconds=60, rehearse=True), sys.argv
    parts.run("step", [sys.executable, "-m", "bench.step", "--rehearse"], 60)
    assert sys.argv is before
    assert parts.done[0]["status"] == "failed"
    assert parts.done[0]["detail"] == "exit 1: ZeroDivisionError: division by zero"
    assert parts.done[0]["output"].startswith("['--rehearse']")


def test_scripts(monkeypatch, tmp_path):
    """Run as modules; without a package that one needs, it says so and nothing is run."""
    parts, commands = gpu.Parts(seconds=60), []

    def run(name, command, limit, **env):
        commands.append(command)
        out = Path(command[-1])
        out.mkdir()
        (out / "any.json").write_text('{"rows": [1]}')
        (out / "any.md").write_text("table")

    monkeypatch.setattr(parts, "run", run)
    assert gpu.script("step", parts, False, tmp_path) == ("table", {"rows": [1]})
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "peft" else name)
    assert gpu.script("llama", parts, False, tmp_path) == ("not run", {})
    assert (parts.done[-1]["status"], parts.done[-1]["detail"]) == ("not run", "needs peft")
    assert [command[1:3] for command in commands] == [["-m", "bench.step"]]


def test_predicted_steps():
    # A block of 202 million weights; 10 bytes an element at 2.7 TB/s over 4 x 2048 operations at
    # 770 TFLOP/s in a step of one micro-batch, and 12 + 2 bytes over 16 times that.
    one, sixteen = (step.Case("block 4096/11008", "bfloat16", 2048, count) for count in (1, 16))
    assert step.predicted(one, "virtual") == pytest.approx(1.348, abs=1e-3)
    assert step.predicted(sixteen, "inplace") == pytest.approx(1.0305, abs=1e-4)
    assert step.predicted(step.Case("MiniLM", "float32", 128, 1), "virtual") is None
    assert step.predicted(one, "published") is None


def test_steps_beside_their_predictions():
    case = step.Case("block 4096/11008", "bfloat16", 2048, 1)
    factor = {"lora": 1, "again": 1.25, "virtual": 1.5, "inplace": 2, "published": 10}
    found = {
        arm: {"seconds": 1e-3 * f, "core_seconds": 2e-3 * f**2, "peak_bytes": f * 2**20}
        for arm, f in factor.items()
    }
    memory = ["1.0", "1.2", "1.5", "2.0", "10.0"]
    start = ["block 4096/11008", "bfloat16", "2048", "1"]
    cuda = row(step.table({case: found}, "cuda"), *start)
    assert cuda == ["1.0", "1.25", "1.50", "2.00", "10.00", "1.35", "1.49", *memory]
    cpu = row(step.table({case: found}, "cpu"), *start)
    assert cpu == ["1.0", "1.25 (1.56)", "1.50 (2.25)", "2.00 (4.00)", "10.00 (100.00)", *memory]
    blank = row(step.table({case: {}}, "cuda"), *start)
    assert blank == [""] * 5 + ["1.35", "1.49"] + [""] * 5
