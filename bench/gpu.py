"""Everything that needs a GPU, in one call: `python3 -m bench.gpu` from the repository's root.

Builds for the GPU's architecture, runs all tests, runs compute-sanitizer over small cases, times
the ops behind their gates and whole optimizer steps, writes bench/results/<device>/gpu.{json,md}
and prints the tables. No network; needs torch, Triton, nvcc, ninja, pybind11, pytest and tabulate.
A part that fails or cannot run is named in the tables, the others still run, and the exit status
is 1.

`--rehearse` walks through all of it where no GPU is, on tiny inputs and other backends, measures
nothing, and writes to a temporary folder only.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench import gpu_table
from bench.gpu_ops import BASELINES, FLATKERN, Cell, plan

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
SANITIZERS = ("memcheck", "racecheck", "initcheck")
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


def by_junit(report: Path) -> Judge:
    """Counts of the tests, and the first failures by name."""

    def judge(status: int, output: str) -> tuple[str, str]:
        if not report.is_file():
            return "failed", by_exit_status(status, output)[1]
        cases = list(ElementTree.parse(report).iter("testcase"))
        failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(c.find("skipped") is not None for c in cases)
        passed = len(cases) - len(failed) - skipped
        detail = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
        names = [f"{c.get('classname')}::{c.get('name')}" for c in failed[:5]]
        detail += ": " + ", ".join(names) if names else ""
        return "ok" if status == 0 and passed else "failed", detail

    return judge


class Parts:
    """Runs parts one after the other or side by side, and keeps what became of each."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.done: list[dict] = []

    def skip(self, name: str, why: str) -> None:
        self.done.append({"name": name, "status": "not run", "seconds": 0.0, "detail": why})

    def run(
        self, name: str, command: list[str], limit: float, judge: Judge = by_exit_status, **env: str
    ) -> None:
        """Run one part within its limit and what is left of the whole."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            self.skip(name, "no time left")
            return
        print(f"{name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        try:
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
            output = result.stdout
            status, detail = judge(result.returncode, output)
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
    """Tests and sanitizers, side by side: none of them is timed."""
    report = folder / "tests.xml"
    tests = [PYTHON, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
    required = "reference,cpu,cuda,triton"
    if rehearse:
        tests.append("tests/noise/test_schedules.py")
        required = "reference"
    elif _has_module("xdist"):
        # By file, because some files compile for all of their tests at once.
        tests += ["-n", "8", "--dist", "loadfile"]
    exercise = [PYTHON, "-m", "bench.gpu_ops", "--exercise"]
    with ThreadPoolExecutor() as pool:
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
        for backend in FLATKERN:
            if rehearse:
                command = [*exercise, "--device", "cpu", "--backend", "reference"]
                pool.submit(parts.run, f"exercise {backend}", command, 120)
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


def _has_module(name: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True).returncode == 0


def _toolkit_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def measure(parts: Parts, rehearse: bool, folder: Path) -> dict[Cell, dict]:
    """Outcomes of all cells; those that a broken process did not reach have failed."""
    rows = folder / "rows.jsonl"
    # Compiling proves nothing about the GPU's half.
    env = {"TORCHDYNAMO_DISABLE": "1"} if rehearse else {}
    groups = {backend: (backend,) for backend in FLATKERN} | {"baselines": (*BASELINES, "gemm")}
    for name, providers in groups.items():
        command = [PYTHON, "-m", "bench.gpu_ops", "--out", str(rows)]
        if rehearse:
            command += ["--device", "cpu", "--backend", "reference"]
        elif name in FLATKERN:
            command += ["--backend", name]
        parts.run(f"timing {name}", [*command, "--provider", *providers], 150, **env)
    outcomes: dict[Cell, dict] = {}
    for line in rows.read_text().splitlines() if rows.is_file() else ():
        row = json.loads(line)
        cell = Cell(**{field: row.pop(field) for field in Cell.__dataclass_fields__})
        outcomes[cell] = row
    lost = {"status": "failed", "why": "its process ended before"}
    return {cell: outcomes.get(cell, lost) for cell in plan(rehearse)}


def step(parts: Parts, rehearse: bool, folder: Path) -> tuple[str, list[dict]]:
    """The table and the rows of whole optimizer steps; none if bench.step did not finish."""
    command = [PYTHON, "-m", "bench.step", "--out", str(folder)]
    parts.run("step", command + (["--rehearse", "--device", "cpu"] if rehearse else []), 150)
    if not (folder / "cuda.json").is_file():
        return "not run", []
    return (folder / "cuda.md").read_text(), json.loads((folder / "cuda.json").read_text())["rows"]


def conditions(device: str) -> dict[str, object]:
    """What the numbers depend on."""
    info = subprocess.run(
        [PYTHON, "-c", "import json, flatkern; print(json.dumps(flatkern.build_info()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
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
    found["build"] = json.loads(info.stdout) if info.returncode == 0 else info.stderr[-500:]
    return found


def write(
    folder: Path,
    where: dict,
    parts: list[dict],
    outcomes: dict[Cell, dict],
    steps: tuple[str, list[dict]],
    head: str,
) -> str:
    """Write gpu.json and gpu.md into the folder; return the text of the latter."""
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
            "## Optimizer steps",
            steps[0].strip(),
            "## Claims",
            gpu_table.claims_table(outcomes, device),
            "## Parts",
            gpu_table.steps_table(parts),
            *(f"- failed: {why}" for why in shut),
        ]
    )
    report = {"conditions": where, "parts": parts, "rows": rows, "steps": steps[1]}
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(text + "\n")
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
    parts = Parts(args.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(parts, args.rehearse)
        check(parts, args.rehearse, folder)
        outcomes = measure(parts, args.rehearse, folder)
        steps = step(parts, args.rehearse, folder)
        where = conditions(device)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        target = folder / slug if args.rehearse else args.out / slug
        head = (
            f"`python3 -m bench.gpu` on {where['date']}: {device}, driver {where['driver']}, CUDA "
            f"{where['cuda']}, torch {where['torch']}, Triton {where['triton']}. Medians; ops and "
            "products replayed from graphs over rotating buffers of more than 256 MB, the "
            "published algorithm as it runs. `of copy`: speed as a share of a copy's in this run."
        )
        print("\n" + write(target, where, parts.done, outcomes, steps, head))
    if args.rehearse:
        print(f"\n{device}: nothing was measured, nothing was kept")
        return int(any(part["status"] == "failed" for part in parts.done))
    print(f"\nwritten to {target}")
    complete = all(row["status"] == "ok" for row in (*parts.done, *outcomes.values()))
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
