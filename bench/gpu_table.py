"""Predictions for the GPU, and the table that sets them beside what was measured."""

from collections import Counter

from tabulate import tabulate

from bench.gpu_ops import FLATKERN, LAYERS, MODEL_OPS, OPS, Cell

# Bytes per second of a device copy, read plus write, on which the predictions rest.
COPY_RATE = {"H100": 3.0e12, "H200": 4.3e12}
# The share of the copy's speed that every streaming kernel should reach.
TARGET = "90 %"
# Of a window with a residual, which computes more than it moves: two copies in 1.4 to 2.1 times
# their time are predicted, at most 1.8 is the goal.
WINDOW_TARGET, WINDOW_PREDICTED = "56 %", "1.4 to 2.1"
# noisy_linear on an H100 with the default scratch: microseconds of the product, then what noise
# adds to it forward and backward, in per cent. By (rows, cols, tokens).
LINEAR = {
    (4096, 4096, 64): (16, 172, 172),
    (4096, 4096, 512): (28, 90, 90),
    (4096, 4096, 2048): (89, 21, 21),
    (4096, 4096, 8192): (348, 5, 5),
    (11008, 4096, 64): (37, 119, 348),
    (11008, 4096, 512): (77, 57, 142),
    (11008, 4096, 2048): (262, 14, 34),
    (11008, 4096, 8192): (908, 8, 5),
}
Outcomes = dict[Cell, dict]


def moves_once(op: str) -> bool:
    """Whether the op reads a matrix or writes one, and not both."""
    return op == "noise" or op.startswith("row_norm")


def bytes_of(cell: Cell) -> int:
    """What the op must move: each input read once, each output written once."""
    size = {"bfloat16": 2, "float32": 4}[cell.dtype]
    passes = 4 if cell.op == "window" else 1 if moves_once(cell.op) else 2
    return cell.rows * cell.cols * size * passes


def predicted_us(cell: Cell, device: str) -> str:
    """The floor: bytes over the rate of a copy."""
    rates = [rate for name, rate in COPY_RATE.items() if name in device]
    return f"{bytes_of(cell) / rates[0] * 1e6:.1f}" if rates else "none"


def _seconds(outcomes: Outcomes, cell: Cell) -> float | None:
    return outcomes.get(cell, {}).get("seconds")


def _microseconds(outcomes: Outcomes, cell: Cell) -> str:
    seconds = _seconds(outcomes, cell)
    if seconds is not None:
        return f"{seconds * 1e6:.1f}"
    # A provider that has no such op has no cell at all.
    return outcomes[cell]["status"] if cell in outcomes else ""


def ops_table(outcomes: Outcomes, device: str) -> str:
    """Every op: its floor, both implementations, and everybody else as a multiple of the better."""
    headers = ["op", "shape", "dtype", "predicted us", "predicted of copy"]
    for name in FLATKERN:
        headers += [f"{name} us", f"{name} of copy"]
    others = ("published", "eager", "compiled")
    lines = []
    for op, rows, cols, dtype in dict.fromkeys((c.op, c.rows, c.cols, c.dtype) for c in outcomes):
        if op not in OPS:
            continue
        at = {name: Cell(op, rows, cols, dtype, name) for name in (*FLATKERN, *others, "copy")}
        cell = at["cuda"]
        line = [op, f"{rows}x{cols}", dtype, predicted_us(cell, device)]
        line.append(WINDOW_TARGET if op == "window" else TARGET)
        copy = _seconds(outcomes, at["copy"])
        copied = (2 if moves_once(op) else 1) * bytes_of(cell)
        for name in FLATKERN:
            own = _seconds(outcomes, at[name])
            share = copy * bytes_of(cell) / copied / own if own and copy else None
            line += [_microseconds(outcomes, at[name]), f"{share:.0%}" if share else ""]
        best = min((s for n in FLATKERN if (s := _seconds(outcomes, at[n]))), default=None)
        for name in others:
            other = _seconds(outcomes, at[name])
            ratio = f"{other / best:.1f}x" if other and best else ""
            line.append(ratio or _microseconds(outcomes, at[name]))
        lines.append(line)
    return _markdown(lines, [*headers, *(f"vs {name}" for name in others)])


def linear_table(outcomes: Outcomes) -> str:
    """noisy_linear: what noise adds to the plain product."""
    lines = []
    for cell in outcomes:
        if not cell.tokens or cell.provider != "gemm":
            continue
        direction = cell.op.split()[1]
        sizes = (cell.rows, cell.cols, cell.tokens)
        product, *added = LINEAR.get(sizes, ("none", "none", "none"))
        expected = added[direction == "backward"]
        line = [f"{cell.rows}x{cell.cols}", cell.tokens, direction, product]
        line += [
            _microseconds(outcomes, cell),
            expected if expected == "none" else f"+{expected} %",
        ]
        plain = _seconds(outcomes, cell)
        for name in FLATKERN:
            own_cell = Cell(cell.op, cell.rows, cell.cols, cell.dtype, name, cell.tokens)
            own = _seconds(outcomes, own_cell)
            ratio = f"{own / plain - 1:+.0%}" if own and plain else None
            line.append(ratio or _microseconds(outcomes, own_cell))
        lines.append(line)
    headers = ["weight", "tokens", "direction", "predicted product us", "product us"]
    return _markdown(lines, [*headers, "predicted with noise", *FLATKERN])


def claims_table(outcomes: Outcomes, device: str) -> str:
    """What else was predicted, on the first shape in bfloat16; and what a call costs the host."""
    shape = next((c.rows, c.cols, c.dtype) for c in outcomes if c.dtype == "bfloat16")
    rate = [f"{rate / 1e12:.1f}" for name, rate in COPY_RATE.items() if name in device]
    copy = Cell("perturb", *shape, "copy")
    lines = [
        ["device copy, TB/s", *(rate or ["none"]), _quotient(outcomes, bytes_of(copy) / 1e12, copy)]
    ]
    for name in FLATKERN:
        merged, perturb = (Cell(op, *shape, name) for op in ("perturb_merged", "perturb"))
        lines.append(
            [
                f"{name}: perturb_merged over perturb",
                "1.5",
                _ratio(outcomes, merged, perturb),
            ]
        )
    window, copies = (Cell("window", *shape, name) for name in ("cuda", "copy"))
    lines.append(
        ["cuda: window over two copies", WINDOW_PREDICTED, _ratio(outcomes, window, copies)]
    )
    cuda, triton = (Cell("perturb", *shape, name) for name in FLATKERN)
    lines.append(["perturb: triton over cuda", "1.0 to 1.05", _ratio(outcomes, triton, cuda)])
    for name, expected in zip(FLATKERN, ("0.2 to 0.5", "1.0"), strict=True):
        shape = next((c.rows, c.cols, c.dtype) for c in outcomes if c.op == "loop")
        foreach, loop = (Cell(op, *shape, name) for op in MODEL_OPS)
        what = f"{name}: foreach_perturb_ of {LAYERS} weights {shape[0]}x{shape[1]} over a loop"
        lines.append([what, expected, _ratio(outcomes, foreach, loop)])
    for cell in outcomes:
        if cell.op == "call":
            name = f"{cell.provider}: host us of a perturb_ call"
            lines.append([name, "none", _microseconds(outcomes, cell)])
    return _markdown(lines, ["claim", "predicted", "outcome"])


def _ratio(outcomes: Outcomes, above: Cell, below: Cell) -> str:
    seconds = _seconds(outcomes, above)
    if seconds is None:
        return _microseconds(outcomes, above)
    return _quotient(outcomes, seconds, below)


def _quotient(outcomes: Outcomes, value: float, cell: Cell) -> str:
    seconds = _seconds(outcomes, cell)
    return _microseconds(outcomes, cell) if seconds is None else f"{value / seconds:.2f}"


def tests_table(by_file: dict[str, Counter[str]]) -> str:
    """How many tests of each file passed, failed and were skipped."""
    outcomes = ("passed", "failed", "skipped")
    lines = [[file, *(counts[name] for name in outcomes)] for file, counts in by_file.items()]
    return _markdown(sorted(lines), ["file", *outcomes])


def steps_table(steps: list[dict]) -> str:
    """What ran, and what did not and why."""
    lines = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["detail"]] for s in steps]
    return _markdown(lines, ["part", "status", "s", "detail"])


def _markdown(lines: list[list], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, stralign="left")
