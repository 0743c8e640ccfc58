"""Runs the benchmarks and writes a table and its numbers: `python -m bench.run` (`make bench`)."""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch
from tabulate import tabulate

import flatkern

HEADERS = (
    "op",
    "shape",
    "dtype",
    "flatkern ms",
    "GB/s",
    "x copy",
    "vs published",
    "vs best eager",
    "vs torch.compile",
    "peak MiB: flatkern",
    "published",
    "best eager",
)


def measure(pytest_args: list[str]) -> list[dict]:
    """Run bench/ under pytest-benchmark; one row per test: its case, provider and best time."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={report}", "--benchmark-disable-gc", "--benchmark-quiet"]
        command += pytest_args
        subprocess.run(command, check=True)
        benchmarks = json.loads(report.read_text())["benchmarks"]
    return [{**b["extra_info"], "seconds": b["stats"]["min"]} for b in benchmarks]


Times = dict[tuple, dict[str, float]]


def least(rows: list[dict], value: str) -> Times:
    """A value by (op, shape, dtype, bytes) and provider: the minimum over both orders."""
    values: Times = defaultdict(dict)
    for row in rows:
        if value in row:
            case = values[row["op"], row["shape"], row["dtype"], row["bytes"]]
            case[row["provider"]] = min(row[value], case.get(row["provider"], math.inf))
    return values


def elements(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def table(times: Times, peaks: Times) -> str:
    """Markdown: flatkern's time, and everybody else's as a multiple of it; large shapes first.

    Peaks are bytes allocated beside the arguments.
    """
    lines = []
    # Sorting is stable: within a dtype and shape the ops keep the order of the benchmarks.
    for case, seconds in sorted(
        times.items(), key=lambda item: (-elements(item[0][1]), item[0][1], item[0][2])
    ):
        op, shape, dtype, size = case
        own = seconds["flatkern"]
        ratios = [
            f"{seconds[name] / own:.1f}x" if name in seconds else ""
            for name in ("published", "eager", "compiled")
        ]
        if "copy" in seconds:
            traffic = [f"{size / own / 1e9:.1f}", f"{own / seconds['copy']:.1f}"]
        else:
            traffic = ["", f"{own / seconds['lora']:.2f} (plain LoRA)"]
        memory = [
            f"{peaks[case][name] / 2**20:.2f}" if name in peaks[case] else ""
            for name in ("flatkern", "published", "eager")
        ]
        lines.append((op, shape, dtype, f"{own * 1e3:.2f}", *traffic, *ratios, *memory))
    return markdown(lines, HEADERS)


def markdown(lines: list[tuple], headers: tuple[str, ...]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, stralign="left")


def residual_table(times: Times, threads: int) -> str:
    """Markdown: what the residual adds to perturb_ and restore_, in ns per element and thread."""
    own = {case[:3]: seconds["flatkern"] for case, seconds in times.items()}
    lines = []
    for shape, dtype in dict.fromkeys(case[1:] for case in own):
        pairs = [(f"{op}_exact", op) for op in ("perturb", "restore")]
        if all((op, shape, dtype) in own for pair in pairs for op in pair):
            seconds = [
                own[exact, shape, dtype] - own[plain, shape, dtype] for exact, plain in pairs
            ]
            ns = [f"{1e9 * s * threads / elements(shape):.2f}" for s in seconds]
            lines.append((shape, dtype, *ns))
    return markdown(lines, ("shape", "dtype", "encode ns", "decode ns"))


def conditions() -> dict[str, object]:
    """What the numbers depend on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **flatkern.build_info(),
    }


def main() -> None:
    """Measure, print the table, write it with the numbers to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    parser.add_argument("pytest_args", nargs="*", help="for pytest, after --: -k 'perturb'")
    args = parser.parse_args()
    where = conditions()
    measured = measure(args.pytest_args)
    times, peaks = least(measured, "seconds"), least(measured, "peak")
    text = table(times, peaks)
    if any(case[0] == "perturb_exact" for case in times):
        text += (
            "\n\nWhat the residual adds to perturb_ and restore_, ns per element and thread:\n\n"
            + residual_table(times, torch.get_num_threads())
        )
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(
            zip(("op", "shape", "dtype", "bytes"), case, strict=True),
            seconds=seconds,
            peak_bytes=peaks[case],
        )
        for case, seconds in times.items()
    ]
    (args.out / "ops.json").write_text(json.dumps({"conditions": where, "rows": rows}, indent=1))
    extension = where["extension"]
    kernels = extension["cpu"] if isinstance(extension, dict) else "reference"
    heading = (
        f"`make bench` on {where['date']}: {where['cpu']}, {where['threads']} threads, "
        f"{kernels} kernels, torch {where['torch']}. Minimum over both orders of "
        "warm rounds; ratios within one run. `x copy`: time over that of copying the weight. "
        "`exact`: with a residual, beside eager copies. Peaks: what an op allocates. Larger shapes "
        "leave out what would take minutes (LEFT_OUT in bench/test_ops.py).\n"
    )
    (args.out / "ops.md").write_text(f"# Single ops on a CPU\n\n{heading}\n{text}\n")
    print(f"\n{heading}\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    main()
