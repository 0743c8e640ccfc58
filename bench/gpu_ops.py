"""Gates and timings of the ops on one device, for bench/gpu.py: one process per backend.

A kernel that breaks the CUDA context takes its process along, and no more: each row is written
as soon as it is known. No op is timed whose gate has not passed.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import flatkern
from flatkern import baselines, ops
from flatkern.ops.residual import is_available

OPS = ("noise", "row_norm", "row_norm rank 64", "perturb", "restore", "perturb_merged", "window")
FLATKERN = ("cuda", "triton")
BASELINES = ("copy", "published", "eager", "compiled")
# A model's worth of weights perturbed, in one call and one after the other.
MODEL_OPS = ("foreach", "loop")
LAYERS = 48
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# CUDA forms B A with multiply-adds at the first rank, on tensor cores at the second.
RANK, LARGE_RANK, SCALING, SIGMA, SEED = 16, 64, 2.0, 0.05, 4
# More than the last-level cache of any GPU today: a buffer comes back to cold caches.
ROTATED_BYTES = 256 * 10**6
REPEATS = 25
# Rounding crosses a boundary with a difference of the noise; its bound is that of the tests.
NOISE_BULK, NOISE_MAX = 1e-5, 5e-4
STEP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Cell:
    """One number of the results: an op, or a direction of noisy_linear where tokens is not 0."""

    op: str
    rows: int
    cols: int
    dtype: str
    provider: str
    tokens: int = 0


def plan(rehearse: bool) -> list[Cell]:
    """Every cell that a complete run fills."""
    shapes = [(40, 72), (24, 72)] if rehearse else [(4096, 4096), (11008, 4096)]
    tokens = [4] if rehearse else [64, 256, 512, 2048, 8192]
    cells = []
    for (rows, cols), dtype, op in itertools.product(shapes, ("bfloat16", "float32"), OPS):
        if op == "noise" and dtype != "float32":
            continue
        for provider in (*FLATKERN, *BASELINES):
            # Compiling takes longer than everything else: once an op.
            once = (rows, cols) == shapes[0] and dtype == "bfloat16"
            if _has(provider, op) and (provider != "compiled" or once):
                cells.append(Cell(op, rows, cols, dtype, provider))
    for (rows, cols), count, provider in itertools.product(shapes, tokens, (*FLATKERN, "gemm")):
        for op in ("noisy_linear forward", "noisy_linear backward"):
            cells.append(Cell(op, rows, cols, "bfloat16", provider, count))
    rows, cols = shapes[0] if rehearse else (512, 512)
    for provider, op in itertools.product(FLATKERN, MODEL_OPS):
        cells.append(Cell(op, rows, cols, "bfloat16", provider))
    cells += [Cell("call", 64, 64, "bfloat16", provider) for provider in FLATKERN]
    return cells


def _has(provider: str, op: str) -> bool:
    missing = {
        "published": {"noise", "window"},
        "compiled": {"noise", "restore", "row_norm rank 64", "window"},
        "eager": {"restore", "window"},
        "triton": {"window"},
    }
    return op not in missing.get(provider, ())


class Inputs:
    """One weight with everything that the ops and their baselines take."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.weight = (normal(rows, cols) / math.sqrt(cols)).to(dtype)
        self.out = torch.empty_like(self.weight)
        self.adapters, self.large_adapters = (
            (normal(rank, cols) / math.sqrt(cols), normal(rows, rank) * 0.01, SCALING)
            for rank in (RANK, LARGE_RANK)
        )
        self.key = flatkern.NoiseKey(seed=1, step=seed, tensor=3).to(device)
        self.exact_norm = self.merged(*self.adapters).norm(dim=1)
        self.norm = self.exact_norm.float()[:, None]
        self.row_scale = (self.exact_norm * (SIGMA / math.sqrt(cols))).float()

    @functools.cached_property
    def residual(self) -> torch.Tensor:
        """Of this weight, with room for everything."""
        return ops.new_residual(self.weight)

    def merged(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
        """W + s B A in float64, without cuBLAS: sanitizers run this."""
        total = self.weight.double()
        for a, b in zip(lora_A.double(), lora_B.double().t(), strict=True):
            total.addcmul_(b[:, None], a[None], value=scaling)
        return total


def provide(op: str, provider: str, i: Inputs, compiled: dict) -> Callable[[], object]:
    """What one timed call does. What it returns is kept, so that outputs rotate too."""
    shape = i.weight.shape
    name = "flatkern" if provider in FLATKERN else provider
    table: dict[tuple[str, str], Callable[[], object]] = {
        ("noise", "flatkern"): lambda: ops.noise(*shape, i.key),
        ("noise", "eager"): lambda: torch.randn(shape, device=i.weight.device),
        ("row_norm", "flatkern"): lambda: ops.row_norm(i.weight, *i.adapters),
        ("row_norm", "published"): lambda: baselines.published_row_norm(i.weight, *i.adapters),
        ("row_norm", "eager"): lambda: baselines.eager_row_norm(i.weight, *i.adapters),
        ("row_norm rank 64", "flatkern"): lambda: ops.row_norm(i.weight, *i.large_adapters),
        ("row_norm rank 64", "published"): lambda: baselines.published_row_norm(
            i.weight, *i.large_adapters
        ),
        ("row_norm rank 64", "eager"): lambda: baselines.eager_row_norm(
            i.weight, *i.large_adapters
        ),
        ("perturb", "flatkern"): lambda: ops.perturb_(i.weight, i.row_scale, i.key),
        ("perturb", "published"): lambda: baselines.published_perturb_(
            i.weight, *i.adapters, SIGMA, SEED
        ),
        ("perturb", "eager"): lambda: baselines.eager_perturb_(i.weight, i.row_scale),
        ("restore", "flatkern"): lambda: ops.restore_(i.weight, i.row_scale, i.key),
        ("restore", "published"): lambda: baselines.published_restore_(
            i.weight, i.norm, SIGMA, SEED
        ),
        ("window", "flatkern"): lambda: _window(i),
        ("perturb_merged", "flatkern"): lambda: ops.perturb_merged_(
            i.weight, *i.adapters, SIGMA, i.key
        ),
        ("perturb_merged", "eager"): lambda: baselines.eager_perturb_merged_(
            i.weight, *i.adapters, SIGMA
        ),
    }
    table["perturb_merged", "published"] = table["perturb", "published"]
    if name == "copy" and op == "window":
        return lambda: (i.out.copy_(i.weight), i.weight.copy_(i.out))
    if name == "copy":
        return lambda: i.out.copy_(i.weight)
    if name != "compiled":
        return table[op, name]
    function = compiled.setdefault(
        op,
        torch.compile(getattr(baselines, f"eager_{op}" + "_" * (op != "row_norm")), dynamic=False),
    )
    arguments = {
        "row_norm": (i.weight, *i.adapters),
        "perturb": (i.weight, i.row_scale),
        "perturb_merged": (i.weight, *i.adapters, SIGMA),
    }[op]
    return lambda: function(*arguments)


def _window(i: Inputs) -> None:
    """Perturb and restore to the exact bit."""
    ops.perturb_(i.weight, i.row_scale, i.key, residual=i.residual)
    ops.restore_(i.weight, i.row_scale, i.key, residual=i.residual)


def measure(calls: list[Callable[[], object]], graph: bool) -> dict[str, object]:
    """Device seconds of one call, over calls that rotate through their buffers.

    A graph replay holds no gaps between launches; what cannot be captured is timed as it runs.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = [call() for call in calls]
        run = captured.replay
    else:

        def run() -> None:
            for call in calls:
                call()

    samples = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / len(calls))
    if graph:
        del kept
    return {"timer": "graph" if graph else "stream", **_spread(samples[3:])}


def _spread(samples: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(samples, n=10)
    return {"seconds": statistics.median(samples), "low": low, "high": high}


def step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next number of `dtype`."""
    size = values.double().abs().clamp_min(torch.finfo(dtype).tiny)
    return torch.exp2(size.log2().floor()) * STEP[dtype]


def within(got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor | float, what: str) -> None:
    """AssertionError unless |got - exact| <= bound everywhere; NaN never passes."""
    wrong = ~((got.double() - exact.double()).abs() <= bound)
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {wrong.sum().item()} of {wrong.numel()} beyond the bound, first at {first}: "
            f"{got[first].item()!r}, not {exact[first].item()!r}"
        )


def gate(op: str, i: Inputs) -> None:
    """One run on fresh inputs against the reference or the op's parts; AssertionError if wrong."""
    rows, cols = i.weight.shape
    weight, c = i.weight.clone(), i.row_scale
    if op == "noise":
        for offsets in ((0, 0), (3, 5)):
            where = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
            words = ops.philox_bits(rows, cols, i.key, **where)
            z = ops.noise(rows, cols, i.key, **where)
            u = ops.uniform(rows, cols, i.key, **where)
            with flatkern.backend("reference"):
                assert torch.equal(words, ops.philox_bits(rows, cols, i.key, **where)), "words"
                assert torch.equal(u, ops.uniform(rows, cols, i.key, **where)), "uniform"
                difference = (z - ops.noise(rows, cols, i.key, **where)).abs()
            assert difference.max() <= NOISE_MAX, f"noise: off by {difference.max().item()}"
            share = (difference > NOISE_BULK).double().mean().item()
            assert share < 1e-4, f"noise: {share:.1e} of it off by more than {NOISE_BULK}"
    elif op == "row_norm":
        within(ops.row_norm(weight, *i.adapters), i.exact_norm, 1e-5 * i.exact_norm, op)
    elif op == "row_norm rank 64":
        exact = i.merged(*i.large_adapters).norm(dim=1)
        within(ops.row_norm(weight, *i.large_adapters), exact, 1e-5 * exact, op)
    elif op in ("perturb", "restore"):
        e = c[:, None] * ops.noise(rows, cols, i.key)
        noisy = (weight.float() + e).to(weight.dtype)
        slack = NOISE_BULK * c.double()[:, None]
        ops.perturb_(weight, c, i.key)
        within(weight, noisy, slack + step(noisy, weight.dtype), op)
        if op == "perturb":
            other = flatkern.NoiseKey(seed=1, step=2, draw=1, tensor=3).to(weight.device)
            exact = i.weight.double() + e + c[:, None] * ops.noise(rows, cols, other)
            plane = ops.perturb_plane(i.weight, torch.stack((c, c)), torch.stack((i.key, other)))
            within(plane, exact, 2 * slack + step(exact, weight.dtype), "perturb_plane")
        if op == "restore":
            ops.restore_(weight, c, i.key)
            largest = torch.maximum(i.weight.abs(), noisy.abs())
            within(weight, i.weight, slack + 2 * step(largest, weight.dtype), op)
    elif op == "window":
        residual = ops.new_residual(weight)
        ops.perturb_(weight, c, i.key, residual=residual)
        ops.check_residual(residual)
        assert torch.equal(weight, ops.perturb(i.weight, c, i.key)), "window: not perturb's bits"
        ops.restore_(weight, c, i.key, residual=residual)
        ops.check_residual(residual)
        assert torch.equal(weight, i.weight), "window: bits changed"
    elif op in MODEL_OPS:
        # Aligned or not, large and small; with residuals, where there are any, and without.
        parts = [weight, weight[:1].clone(), weight[:, 1:], weight[:0]]
        scales = [c, c[:1], c, c[:0]]
        clean = [part.clone() for part in parts]
        for again in (False, is_available(weight)):
            copies = [part.clone() for part in parts]
            own = {"residuals": [ops.new_residual(part) for part in parts]} if again else {}
            lists = copies, scales, [i.key] * len(parts)
            ops.foreach_perturb_(*lists, **own)
            for got, part, scale in zip(copies, clean, scales, strict=True):
                assert torch.equal(got, ops.perturb(part, scale, i.key)), "foreach: not perturb's"
            ops.foreach_restore_(*lists, **own)
            for residual in own.get("residuals", ()):
                ops.check_residual(residual)
            assert not again or all(map(torch.equal, copies, clean)), "foreach: bits changed"
    elif op == "perturb_merged":
        parts = i.weight.clone()
        c = ops.row_norm(parts, *i.adapters) * (SIGMA / math.sqrt(cols))
        ops.perturb_(parts, c, i.key)
        got = ops.perturb_merged_(weight, *i.adapters, SIGMA, i.key)
        assert torch.equal(got, c), "perturb_merged: scales differ from row_norm's"
        assert torch.equal(weight, parts), "perturb_merged: bits differ from its parts'"
    else:
        x = torch.randn(8, cols, device=weight.device).to(weight.dtype)
        noisy = ops.perturb(weight, c, i.key).double()
        y = _forward(x, i)()
        (grad_x,) = _backward(y, i)()
        for got, exact in ((y, x.double() @ noisy.t()), (grad_x, y.double() @ noisy)):
            error = (got.double() - exact).norm() / exact.norm()
            # One rounding to the dtype, or the product's own accumulation in float32.
            bound = max(STEP[weight.dtype], 1e-5)
            assert error <= bound, f"{op}: relative error {error.item():.1e}"


def _forward(x: torch.Tensor, i: Inputs) -> Callable[[], object]:
    return lambda: ops.noisy_linear(x, i.weight, None, None, None, 1.0, i.row_scale, i.key)


def _backward(grad: torch.Tensor, i: Inputs) -> Callable[[], object]:
    # x is only read for the gradients of adapters.
    return lambda: torch.ops.flatkern.noisy_linear_backward(
        *(grad, None, i.weight, None, None, 1.0),
        *(i.row_scale, i.key, True, False, False),
    )


def _linear_call(cell: Cell, i: Inputs) -> Callable[[], object]:
    forward = cell.op.endswith("forward")
    length = cell.cols if forward else cell.rows
    x = torch.randn(cell.tokens, length, device=i.weight.device).to(i.weight.dtype)
    if cell.provider == "gemm":
        return (lambda: F.linear(x, i.weight)) if forward else (lambda: x @ i.weight)
    return (_forward if forward else _backward)(x, i)


def _model_call(op: str, layers: list[Inputs]) -> Callable[[], object]:
    """A call for all of them."""
    lists = ([getattr(i, name) for i in layers] for name in ("weight", "row_scale", "key"))
    weights, scales, keys = lists
    if op == "foreach":
        return lambda: ops.foreach_perturb_(weights, scales, keys)
    return lambda: [ops.perturb_(*one) for one in zip(weights, scales, keys, strict=True)]


def _host_seconds(i: Inputs) -> dict[str, float]:
    """Host time of a call that launches next to nothing."""
    samples = []
    for _ in range(300):
        begin = time.perf_counter()
        ops.perturb_(i.weight, i.row_scale, i.key)
        samples.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return _spread(samples[100:])


class Runner:
    """Fills cells on one device, keeping inputs and gates between cells that share them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gates: dict[tuple, str | None] = {}
        self.compiled: dict[str, Callable] = {}
        self.shape: tuple = ()
        self.rotation: list[Inputs] = []

    def inputs(self, cell: Cell) -> list[Inputs]:
        shape = (cell.rows, cell.cols, cell.dtype)
        if shape != self.shape:
            self.rotation = []
            dtype = DTYPES[cell.dtype]
            each = cell.rows * cell.cols * dtype.itemsize
            count = 2 if self.device.type == "cpu" else ROTATED_BYTES // each + 1
            self.rotation = [
                Inputs(cell.rows, cell.cols, dtype, self.device, seed)
                for seed in range(1 if cell.op == "call" else count)
            ]
            self.shape = shape
        return self.rotation

    def why_shut(self, cell: Cell, i: Inputs) -> str | None:
        """Why the cell's gate is shut, or None."""
        if cell.provider not in FLATKERN:
            return None
        op = cell.op.split()[0] if cell.tokens else cell.op.replace("call", "perturb")
        place = (op, *self.shape)
        if place not in self.gates:
            self.gates[place] = None
            try:
                gate(op, i)
            except AssertionError as error:
                self.gates[place] = f"gate: {error}"
        return self.gates[place]

    def fill(self, cell: Cell) -> dict[str, object]:
        """The cell's outcome: `status` is ok, failed or, where nothing is timed, not run."""
        rotation = self.inputs(cell)
        shut = self.why_shut(cell, rotation[0])
        if shut is not None:
            return {"status": "failed", "why": shut}
        if cell.tokens:
            calls = [_linear_call(cell, i) for i in rotation]
        elif cell.op in MODEL_OPS:
            starts = range(0, max(1, len(rotation) - LAYERS + 1), LAYERS)
            calls = [_model_call(cell.op, rotation[k : k + LAYERS]) for k in starts]
        else:
            op = cell.op.replace("call", "perturb")
            calls = [provide(op, cell.provider, i, self.compiled) for i in rotation]
        if self.device.type == "cpu":
            for call in calls:
                call()
            return {"status": "not run", "why": "rehearsal"}
        if cell.op == "call":
            return {"status": "ok", **_host_seconds(rotation[0])}
        # Seeding the global generator, as the published trainer does, cannot be captured.
        return {"status": "ok", **measure(calls, graph=cell.provider != "published")}


def exercise(device: torch.device) -> None:
    """Every op's gate on small odd shapes, for compute-sanitizer; a rehearsal's are smaller."""
    shapes = ((37, 264), (5, 4099)) if device.type == "cuda" else ((3, 24), (2, 99))
    for (rows, cols), dtype in itertools.product(shapes, DTYPES.values()):
        i = Inputs(rows, cols, dtype, device, 1)
        for op in (*OPS, "foreach"):
            if op != "window" or is_available(i.weight):
                gate(op, i)
        # The paths for rows that are not aligned, and for restore and elementwise noise.
        wide = torch.zeros(rows, cols + 1, dtype=dtype, device=device)
        wide[:, 1:].copy_(i.weight)
        ops.perturb_(wide[:, 1:], i.row_scale, i.key, elementwise=True, col_offset=3)
        ops.restore_(wide[:, 1:], i.row_scale, i.key, elementwise=True, col_offset=3)
        assert torch.isfinite(wide).all()
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Fill the cells of one provider, or exercise its kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", help="forces this backend; default: auto")
    parser.add_argument("--provider", nargs="*", default=[], help="fill the cells of these")
    parser.add_argument("--out", type=Path, help="append one JSON row per cell to this file")
    parser.add_argument("--exercise", action="store_true", help="gates on small shapes, no timing")
    args = parser.parse_args()
    # The published algorithm is float32 throughout.
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad(), flatkern.backend(args.backend or "auto"):
        if args.exercise:
            exercise(args.device)
            return
        runner = Runner(args.device)
        for cell in plan(rehearse=args.device.type == "cpu"):
            if cell.provider not in args.provider:
                continue
            try:
                outcome = runner.fill(cell)
            except Exception as error:
                traceback.print_exc()
                outcome = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
            with args.out.open("a") as file:
                file.write(json.dumps(asdict(cell) | outcome) + "\n")


if __name__ == "__main__":
    main()
