"""Runs the benchmarks and writes a table and its numbers: `python -m bench.run` (`make bench`)."""

import argparse
import json
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


def fastest(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """Seconds by (op, shape, dtype, bytes) and provider: the minimum over both orders."""
    times: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        case = times[row["op"], row["shape"], row["dtype"], row["bytes"]]
        case[row["provider"]] = min(row["seconds"], case.get(row["provider"], float("inf")))
    return times


def table(times: dict[tuple, dict[str, float]]) -> str:
    """Markdown: flatkern's time, and everybody else's as a multiple of it; large shapes first."""
    lines = []
    # Sorting is stable: within a dtype and shape the ops keep the order of the benchmarks.
    for (op, shape, dtype, size), seconds in sorted(
        times.items(), key=lambda item: (-int(item[0][1].split("x")[0]), item[0][2])
    ):
        own = seconds["flatkern"]
        ratios = [
            f"{seconds[name] / own:.1f}x" if name in seconds else ""
            for name in ("published", "eager", "compiled")
        ]
        if "copy" in seconds:
            traffic = [f"{size / own / 1e9:.1f}", f"{own / seconds['copy']:.1f}"]
        else:
            traffic = ["", f"{own / seconds['lora']:.2f} (plain LoRA)"]
        lines.append((op, shape, dtype, f"{own * 1e3:.2f}", *traffic, *ratios))
    return tabulate(lines, HEADERS, tablefmt="github", disable_numparse=True, stralign="left")


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
    times = fastest(measure(args.pytest_args))
    text = table(times)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"op": op, "shape": shape, "dtype": dtype, "bytes": size, "seconds": seconds}
        for (op, shape, dtype, size), seconds in times.items()
    ]
    (args.out / "ops.json").write_text(json.dumps({"conditions": where, "rows": rows}, indent=1))
    extension = where["extension"]
    kernels = extension["cpu"] if isinstance(extension, dict) else "reference"
    heading = (
        f"`make bench` on {where['date']}: {where['cpu']}, {where['threads']} threads, "
        f"{kernels} kernels, torch {where['torch']}. Minimum over both orders of "
        "warm rounds; ratios within one run. `x copy`: time over that of copying the weight.\n"
    )
    (args.out / "ops.md").write_text(f"{heading}\n{text}\n")
    print(f"\n{heading}\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    main()
