"""Everything that needs a GPU, in one call: `python3 -m bench.gpu` from the repository's root.

Builds for the GPU's architecture, runs the tests that touch a GPU, those of sharded training and of
the integrations, runs compute-sanitizer over small cases, times the ops behind their gates, whole
optimizer steps, those of a model of Llama-2-7B's shapes under PEFT, and the host's share, writes
bench/results/<device>/gpu.{json,md}, prints the tables, and puts the tracebacks of tests that
failed into failed-tests.txt beside them. No network; needs torch, Triton, nvcc, ninja, pybind11,
pytest and tabulate, and peft and transformers for the last two. A part that fails or cannot run is
named in the tables, the others still run, and the exit status is 1.

`--rehearse` walks through all of it where no GPU is, on tiny inputs and other backends, measures
nothing, and writes to a temporary folder only. Benchmarks then run in one process.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

import flatkern
from bench import gpu_table
from bench.gpu_ops import BASELINES, FLATKERN, Cell, plan

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# What is the same with and without a GPU is left to `make test`.
TESTS = ("tests/test_gpu.py", "tests/integrations", "tests/ops", "tests/noise")
TOUCHES_A_GPU = "test_gpu or integrations or cuda or triton"
# Benchmarks in processes of their own, with what keeps them short here, the seconds that they may
# take, and what they need besides.
SCRIPTS = {
    "step": ([], 150, ()),
    "llama": (["--layers", "8", "--limit", "15"], 120, ("transformers", "peft")),
    "host": (["--device", "cuda"], 90, ("peft",)),
}
# With fewer seconds left a part is not begun.
LEAST = 5
Judge = Callable[[int, str], tuple[str, str]]


def by_exit_status(status: int, output: str) -> tuple[str, str]:
    """(status, detail) of a part that says nothing but how it ended."""
    if status == 0:
        return "ok", ""
    lines = [line for line in output.splitlines() if line.strip()]
    return "failed", f"exit {status}: {lines[-1] if lines else 'no output'}"[:300]


def by_sanitizer(status: int, output: str) -> tuple[str, str]:
    """compute-sanitizer's own summary; without one it did not get as far."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", output)
    clean = status == 0 and summaries and all(line.startswith("0 ") for line in summaries)
    return "ok" if clean else "failed", summaries[-1] if summaries else by_exit_status(
        status, output
    )[1]


@dataclass
class Tests:
    """What pytest reported of its tests, by file."""

    by_file: dict[str, Counter[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # tracebacks by test

    @classmethod
    def read(cls, report: Path) -> "Tests":
        """Of a JUnit report; none where pytest wrote none."""
        tests = cls()
        for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
            file = str(case.get("classname")).replace(".", "/")
            broken = (
                case.find("failure") if case.find("failure") is not None else case.find("error")
            )
            skipped = case.find("skipped") is not None
            outcome = "failed" if broken is not None else "skipped" if skipped else "passed"
            tests.by_file.setdefault(file, Counter())[outcome] += 1
            if broken is not None:
                tests.failures[f"{file}::{case.get('name')}"] = broken.text or ""
        return tests

    def counts(self) -> str:
        """How many tests had each outcome."""
        total = sum(self.by_file.values(), Counter())
        return ", ".join(f"{total[name]} {name}" for name in ("passed", "failed", "skipped"))

    def tracebacks(self) -> str:
        """Every test that failed, by name."""
        return "\n".join(f"{name}\n{text}\n" for name, text in self.failures.items())


def by_junit(report: Path) -> Judge:
    """Counts of the tests."""

    def judge(status: int, output: str) -> tuple[str, str]:
        tests = Tests.read(report)
        if not tests.by_file:
            return "failed", by_exit_status(status, output)[1]
        passed = any(counts["passed"] for counts in tests.by_file.values())
        return "ok" if status == 0 and passed else "failed", tests.counts()

    return judge


def in_this_process(module: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of `python -m module arguments`, without its imports once more."""
    output, before = io.StringIO(), sys.argv
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            importlib.import_module(module).main()
            status = 0
        except (Exception, SystemExit):
            traceback.print_exc()
            status = 1
        finally:
            sys.argv = before
    return status, output.getvalue()


class Parts:
    """Runs parts one after the other or side by side, and keeps what became of each."""

    def __init__(self, seconds: float, rehearse: bool = False) -> None:
        self.end = time.monotonic() + seconds
        self.rehearse = rehearse
        self.done: list[dict] = []

    def skip(self, name: str, why: str) -> None:
        self.done.append({"name": name, "status": "not run", "seconds": 0.0, "detail": why})

    def run(
        self, name: str, command: list[str], limit: float, judge: Judge = by_exit_status, **env: str
    ) -> None:
        """Run one part within its limit and what is left of the whole."""
        limit = min(limit, self.end - time.monotonic())
        if limit < LEAST:
            self.skip(name, "no time left")
            return
        print(f"{name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        try:
            if self.rehearse and command[2].startswith("bench."):
                code, output = in_this_process(command[2], command[3:])
            else:
                result = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=limit,
                    check=False,
                )
                code, output = result.returncode, result.stdout
            status, detail = judge(code, output)
        except subprocess.TimeoutExpired as error:
            output = (error.output or b"").decode(errors="replace")
            status, detail = "failed", f"stopped after {limit:.0f} s"
        except OSError as error:
            output, status, detail = "", "failed", str(error)
        seconds = time.monotonic() - begin
        part = {"name": name, "status": status, "seconds": seconds, "detail": detail}
        if status != "ok":
            part["output"] = output[-4000:]
            print(f"{name}: {status}: {detail}\n{output[-4000:]}", flush=True)
        self.done.append(part)


def build(parts: Parts, rehearse: bool) -> None:
    if rehearse:
        parts.skip("build", "rehearsal")
        return
    major, minor = torch.cuda.get_device_capability()
    parts.run(
        "build",
        [PYTHON, "setup.py", "build_ext", "--inplace"],
        240,
        FLATKERN_CUDA="1",
        TORCH_CUDA_ARCH_LIST=f"{major}.{minor}",
        MAX_JOBS=str(os.cpu_count() or 1),
    )


def check(parts: Parts, rehearse: bool, folder: Path) -> None:
    """Tests and sanitizers, side by side: none of them is timed. One by one in a rehearsal."""
    report = folder / "tests.xml"
    tests = [PYTHON, "-m", "pytest", f"--junitxml={report}", "-p", "no:hypothesispytest"]
    required = "reference,cpu,cuda,triton"
    if rehearse:
        tests.append("tests/noise/test_schedules.py")
        required = "reference"
    else:
        tests += [*TESTS, "-k", TOUCHES_A_GPU]
        if find_spec("xdist"):
            # By file, because some files compile for all of their tests at once.
            tests += ["-n", str(os.cpu_count() or 1), "--dist", "loadfile"]
    exercise = [PYTHON, "-m", "bench.gpu_ops", "--exercise"]
    with ThreadPoolExecutor(1 if rehearse else None) as pool:
        threads = {"OMP_NUM_THREADS": "2"}
        pool.submit(
            parts.run,
            "tests",
            tests,
            280,
            by_junit(report),
            FLATKERN_TEST_REQUIRE=required,
            **threads,
        )
        if rehearse:
            command = [*exercise, "--device", "cpu", "--backend", "reference"]
            pool.submit(parts.run, "exercise", command, 120)
        for tool in SANITIZERS:
            if (sanitizer := shutil.which("compute-sanitizer") or _toolkit_sanitizer()) is None:
                parts.skip(tool, "compute-sanitizer was not found")
                continue
            if rehearse:
                parts.skip(tool, "rehearsal")
                continue
            for backend in FLATKERN:
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *exercise]
                pool.submit(
                    parts.run,
                    f"{tool} {backend}",
                    [*command, "--backend", backend],
                    200,
                    by_sanitizer,
                    # So that an access past the end of a tensor leaves its allocation.
                    PYTORCH_NO_CUDA_MEMORY_CACHING="1",
                    **threads,
                )


def _toolkit_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def measure(parts: Parts, rehearse: bool, folder: Path) -> dict[Cell, dict]:
    """Outcomes of all cells; those that a broken process did not reach have failed."""
    rows = folder / "rows.jsonl"
    groups = {backend: (backend,) for backend in FLATKERN} | {"baselines": (*BASELINES, "gemm")}
    if rehearse:
        groups = {"all": tuple(name for group in groups.values() for name in group)}
    for name, providers in groups.items():
        command = [PYTHON, "-m", "bench.gpu_ops", "--out", str(rows)]
        if rehearse:
            command += ["--device", "cpu", "--backend", "reference"]
        elif name in FLATKERN:
            command += ["--backend", name]
        parts.run(f"timing {name}", [*command, "--provider", *providers], 150)
    outcomes: dict[Cell, dict] = {}
    for line in rows.read_text().splitlines() if rows.is_file() else ():
        row = json.loads(line)
        cell = Cell(**{field: row.pop(field) for field in Cell.__dataclass_fields__})
        outcomes[cell] = row
    lost = {"status": "failed", "why": "its process ended before"}
    return {cell: outcomes.get(cell, lost) for cell in plan(rehearse)}


def script(name: str, parts: Parts, rehearse: bool, folder: Path) -> tuple[str, dict]:
    """The table and the numbers of `python -m bench.<name>`; none if it did not finish."""
    options, limit, needed = SCRIPTS[name]
    absent = [module for module in needed if find_spec(module) is None]
    if absent:
        parts.skip(name, f"needs {' and '.join(absent)}")
        return "not run", {}
    if rehearse:
        options = ["--rehearse", "--device", "cpu"]
    out = folder / name
    parts.run(name, [PYTHON, "-m", f"bench.{name}", *options, "--out", str(out)], limit)
    found = [*out.glob("*.json")]
    if not found:
        return "not run", {}
    return found[0].with_suffix(".md").read_text(), json.loads(found[0].read_text())


def built(rehearse: bool) -> object:
    """What was built, by another process than this, which imported what was there before."""
    if rehearse:
        return flatkern.build_info()
    info = subprocess.run(
        [PYTHON, "-c", "import json, flatkern; print(json.dumps(flatkern.build_info()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(info.stdout) if info.returncode == 0 else info.stderr[-500:]


def conditions(device: str, rehearse: bool) -> dict[str, object]:
    """What the numbers depend on."""
    driver = ""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    found = {
        "date": date.today().isoformat(),
        "device": device,
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    found["build"] = built(rehearse)
    return found


def write(
    folder: Path,
    where: dict,
    parts: list[dict],
    outcomes: dict[Cell, dict],
    scripts: dict[str, tuple[str, dict]],
    tests: Tests,
    head: str,
) -> str:
    """Write gpu.json, gpu.md and failures into the folder; return the text of gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    device = str(where["device"])
    rows = [asdict(cell) | outcome for cell, outcome in outcomes.items()]
    shut = sorted({row["why"] for row in rows if row["status"] == "failed"})
    text = "\n\n".join(
        [
            head,
            "## Ops",
            gpu_table.ops_table(outcomes, device),
            "## noisy_linear",
            gpu_table.linear_table(outcomes),
            "## Claims",
            gpu_table.claims_table(outcomes, device),
            "## Optimizer steps",
            scripts["step"][0].strip(),
            "## Llama-2-7B's layers",
            scripts["llama"][0].strip(),
            "## The host",
            scripts["host"][0].strip(),
            "## Tests",
            gpu_table.tests_table(tests.by_file),
            "## Parts",
            gpu_table.steps_table(parts),
            *(f"- failed: {why}" for why in shut),
        ]
    )
    report = {"conditions": where, "parts": parts, "rows": rows}
    report |= {name: numbers for name, (_, numbers) in scripts.items()}
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(text + "\n")
    (folder / "failed-tests.txt").unlink(missing_ok=True)
    if tests.failures:
        (folder / "failed-tests.txt").write_text(tests.tracebacks())
    return text


def main() -> int:
    """Run every part, write and print the results; 0 only if every part ran and passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="walk through it without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts together")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.gpu: error: torch sees no CUDA device; --rehearse needs none", file=sys.stderr)
        return 2
    device = "REHEARSAL, no GPU" if args.rehearse else torch.cuda.get_device_name()
    if args.rehearse:
        print(device)
        # Compiling proves nothing about the GPU's half.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        torch.set_num_threads(1)
    parts = Parts(args.seconds, args.rehearse)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(parts, args.rehearse)
        check(parts, args.rehearse, folder)
        outcomes = measure(parts, args.rehearse, folder)
        scripts = {name: script(name, parts, args.rehearse, folder) for name in SCRIPTS}
        where = conditions(device, args.rehearse)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        target = folder / slug if args.rehearse else args.out / slug
        head = (
            f"`python3 -m bench.gpu` on {where['date']}: {device}, driver {where['driver']}, CUDA "
            f"{where['cuda']}, torch {where['torch']}, Triton {where['triton']}. Medians; ops and "
            "products replayed from graphs over rotating buffers of more than 256 MB, the "
            "published algorithm as it runs. `of copy`: speed as a share of a copy's in this run."
        )
        tests = Tests.read(folder / "tests.xml")
        print("\n" + write(target, where, parts.done, outcomes, scripts, tests, head))
    if args.rehearse:
        print(f"\n{device}: nothing was measured, nothing was kept")
        return int(any(part["status"] == "failed" for part in parts.done))
    print(f"\nwritten to {target}")
    complete = all(row["status"] == "ok" for row in (*parts.done, *outcomes.values()))
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
