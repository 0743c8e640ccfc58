"""Every op beside the limits of its GPU, as one picture: `python -m bench.roofline`.

Reads bench/results/*/gpu.json, which bench.gpu wrote, and draws bench/results/roofline.svg and
.png: time as a multiple of what a copy in the same run takes to move the op's bytes, so that 1 is
the memory's speed, and the time that the op's instructions take to issue (of the machine code for
sm_90 in bench/results/sass).
"""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.gpu_ops import OPS, Cell
from bench.gpu_table import Outcomes, moves_once

RESULTS = Path(__file__).parent / "results"
# 132 SMs, each with 128 lanes, at the clock that both hold under load.
ISSUES_PER_SECOND = 132 * 128 * 1.755e9
# What issues for an element, by op: the names of kernels.
KERNELS = {
    "noise": ("noise_kernel<true>",),
    "perturb": ("perturb_kernel<Perturb, {0}, {0}, false>",),
    "restore": ("perturb_kernel<Restore, {0}, {0}, false>",),
    "window": (
        "perturb_residual_kernel<{0}, false, true>",
        "restore_residual_kernel<{0}, false, true>",
    ),
}
TYPES = {"bfloat16": "BFloat16", "float32": "float"}
# Colours of Okabe and Ito, which colour-blind readers tell apart; shapes tell them apart in grey.
PROVIDERS = {
    "cuda": ("flatkern, CUDA C++", "#0072B2", "o"),
    "triton": ("flatkern, Triton", "#E69F00", "^"),
    "eager": ("eager PyTorch", "#000000", "x"),
    "compiled": ("torch.compile of that", "#CC79A7", "D"),
}
ROWS, COLS = 4096, 4096


def instructions(kernels: list[dict], op: str, dtype: str) -> float | None:
    """Issued for an element on sm_90, in all kernels of the op; None where nobody has counted."""
    names = [name.format(TYPES[dtype]) for name in KERNELS.get(op, ())]
    counts = [
        row["path"] or row["per_element"]
        for row in kernels
        if row["arch"] == 90 and row["kernel"] in names
    ]
    return sum(counts) if names and len(counts) == len(names) else None


def read(folder: Path) -> tuple[str, Outcomes]:
    """What a run is called, and its outcomes."""
    report = json.loads((folder / "gpu.json").read_text())
    outcomes = {}
    for row in report["rows"]:
        outcomes[Cell(**{name: row[name] for name in Cell.__dataclass_fields__})] = row
    about = report["conditions"]
    title = f"{about['device']}, {about['date']}"
    return title + (f", commit {report['commit']}" if "commit" in report else ""), outcomes


def multiples(outcomes: Outcomes, op: str, dtype: str) -> tuple[dict[str, float], float]:
    """Time of each provider over the copy's for the op's bytes; and the latter in seconds."""
    at = {name: Cell(op, ROWS, COLS, dtype, name) for name in (*PROVIDERS, "copy")}
    seconds = {name: outcomes.get(cell, {}).get("seconds") for name, cell in at.items()}
    # The copy beside an op that only reads or only writes moves twice its bytes.
    floor = seconds.pop("copy") / (2 if moves_once(op) else 1)
    return {name: value / floor for name, value in seconds.items() if value}, floor


def draw(axes: Axes, outcomes: Outcomes, kernels: list[dict]) -> None:
    """One run: a line for each op and dtype."""
    lines = [(op, dtype) for dtype in TYPES for op in OPS]
    lines = [line for line in lines if Cell(line[0], ROWS, COLS, line[1], "copy") in outcomes]
    for y, (op, dtype) in enumerate(lines):
        found, floor = multiples(outcomes, op, dtype)
        if count := instructions(kernels, op, dtype):
            issue = count * ROWS * COLS / ISSUES_PER_SECOND / floor
            axes.plot([issue] * 2, [y - 0.35, y + 0.35], color="#555555", lw=2.5, zorder=2)
        for name, value in found.items():
            _, colour, marker = PROVIDERS[name]
            axes.plot(value, y, marker, color=colour, ms=7, zorder=3)
    axes.axvline(1, color="#009E73", lw=2, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.18, 16)
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_yticks(range(len(lines)), [f"{op}, {dtype}" for op, dtype in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.set_xlabel("time, in times of a copy's for the same bytes (left is faster)")


def picture(folders: list[Path], target: Path) -> None:
    """Draw the runs side by side."""
    # Text stays text, and the same run gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flatkern"})
    kernels = json.loads((RESULTS / "sass" / "sass.json").read_text())["kernels"]
    figure, panels = plt.subplots(
        1, len(folders), figsize=(6.4 * len(folders), 5.2), sharey=True, squeeze=False
    )
    for axes, folder in zip(panels[0], folders, strict=True):
        title, outcomes = read(folder)
        draw(axes, outcomes, kernels)
        axes.set_title(title, fontsize=10)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, ls="", label=label)
        for label, colour, marker in PROVIDERS.values()
    ]
    handles += [
        plt.Line2D([], [], color="#009E73", lw=2, label="limit of the memory: a copy in this run"),
        plt.Line2D([], [], color="#555555", lw=2.5, label="limit of the issue slots (sm_90)"),
    ]
    figure.legend(handles=handles, ncols=3, loc="lower center", frameon=False)
    figure.suptitle(f"Ops on a weight {ROWS} x {COLS}, rank 16 where none is named")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(target.with_suffix(f".{suffix}"), dpi=110, metadata=metadata)
    plt.close(figure)


def main() -> None:
    """Draw all runs that are committed."""
    matplotlib.use("Agg")
    picture(sorted(path.parent for path in RESULTS.glob("*/gpu.json")), RESULTS / "roofline")


if __name__ == "__main__":
    main()
