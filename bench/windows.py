"""Thousands of in-place windows: how many weights are changed afterwards?

`python -m bench.windows` opens 6,250 windows of Flat-LoRA's noise as a published run does (its
length, sigma = 0.05, a cosine ramp) over random weights, weights of every special kind and an
encoder layer of MiniLM, in each dtype, once with the residual and once with the published trainer's
own add-then-subtract, and writes bench/results/windows. Exits with 1 if flatkern changed a bit.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import flatkern
from bench.run import conditions
from flatkern import baselines
from flatkern._bits import count_changed
from flatkern.nn import replace_linear

RESULTS = Path(__file__).parent / "results" / "windows"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIGMA, RANK, SCALING = 0.05, 8, 2.0


@dataclass(frozen=True)
class Outcome:
    """What became of one set of weights; shares and drift of the published algorithm."""

    weights: str
    dtype: str
    elements: int
    changed: int  # bit patterns that differ
    bits: float  # of residual per element
    ms: float  # a window
    published_changed: float  # share of its elements
    published_drift: float  # relative to the norm


def random_weight(rows: int = 256, cols: int = 1024) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, cols, generator=generator) / math.sqrt(cols)


def special_weight(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, denormals and the largest numbers throughout; some NaN and infinity."""
    weight = random_weight(64).to(dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for place, value in enumerate((0.0, -0.0, smallest / 4, -smallest / 4)):
        weight[:, place::16] = value
    # Of a row with one of these the noise is not finite, or swallows all else.
    rows = {1: largest, 2: -largest, 3: math.nan, 4: math.inf, 5: -math.inf}
    for row, value in rows.items():
        weight[row, 7::64] = value
    weight[6] = 0.0
    return weight


@cache
def minilm_layer() -> dict[str, Tensor]:
    from flatkern.demo import model

    encoder, _ = model.load_pretrained()
    layer = next(m for m in encoder.modules() if type(m).__name__ == "BertLayer")
    return {n: m.weight.detach() for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


# Sets of weights in a dtype; the published algorithm runs on the first of each.
KINDS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "random": lambda dtype: [random_weight().to(dtype)],
    "special": lambda dtype: [special_weight(dtype)],
    "MiniLM layer": lambda dtype: [weight.to(dtype) for weight in minilm_layer().values()],
}


def layers(weights: list[Tensor]) -> nn.ModuleList:
    """A LoRALinear over each, its B away from zero."""
    linears = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights]
    model = nn.ModuleList(linears)
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data.copy_(weight)
    replace_linear(model, [str(i) for i in range(len(weights))], r=RANK, lora_alpha=RANK * SCALING)
    generator = torch.Generator().manual_seed(1)
    for layer in model:
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.01)
    return model


def with_residual(weights: list[Tensor], windows: int, tick: Callable[[], None]) -> tuple:
    """Changed bit patterns, bits of residual per element and milliseconds of a window."""
    model = layers(weights)
    ramp = flatkern.cosine_ramp(windows)
    options = {"mode": "inplace", "restore": "residual", "schedule": ramp, "seed": 3}
    noise = flatkern.WeightNoise(model, SIGMA, **options)
    begin = time.perf_counter()
    for _ in range(windows):
        with noise.window():
            pass
        tick()
    seconds = time.perf_counter() - begin
    wrong = sum(
        count_changed(layer.weight, weight) for layer, weight in zip(model, weights, strict=True)
    )
    elements = sum(weight.numel() for weight in weights)
    held = sum(state.keeper.nbytes() for state in noise._states)
    return wrong, 8 * held / elements, 1e3 * seconds / windows


def published(weight: Tensor, windows: int, tick: Callable[[], None]) -> tuple[float, float]:
    """Share of the elements that the published algorithm changes, and their drift."""
    layer = layers([weight])[0]
    lora = layer.lora_A.detach().float(), layer.lora_B.detach().float(), SCALING
    if not weight.isfinite().all():
        return math.nan, math.nan  # it raises
    work, ramp = weight.clone(), flatkern.cosine_ramp(windows)
    for step in range(windows):
        sigma = SIGMA * ramp(step)
        norm = baselines.published_perturb_(work, *lora, sigma, step)
        baselines.published_restore_(work, norm, sigma, step)
        tick()
    drift = (work.double() - weight.double()).norm() / weight.double().norm()
    return count_changed(work, weight) / weight.numel(), drift.item()


def table(outcomes: list[Outcome]) -> str:
    """Markdown, one row a set of weights."""
    rows = [
        (
            o.weights,
            o.dtype,
            f"{o.elements:,}",
            o.changed,
            f"{o.bits:.3f}",
            f"{o.ms:.2f}",
            "raises" if math.isnan(o.published_changed) else f"{o.published_changed:.1%}",
            "" if math.isnan(o.published_drift) else f"{o.published_drift:.1e}",
        )
        for o in outcomes
    ]
    headers = ("weights", "dtype", "elements", "bits changed", "residual bits/element")
    headers += ("ms a window", "published: changed", "published: drift")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Run everything, print the table and write it with its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.windows")
    parser.add_argument("--windows", type=int, default=6250)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    outcomes = []
    with torch.no_grad(), tqdm(unit="window") as bar:
        bar.total = 2 * len(args.dtypes) * len(KINDS) * args.windows
        for name in args.dtypes:
            dtype = getattr(torch, name)
            for kind, weights_in in KINDS.items():
                weights = weights_in(dtype)
                bar.set_description(f"{kind}, {name}")
                exact = with_residual(weights, args.windows, bar.update)
                drift = published(weights[0], args.windows, bar.update)
                elements = sum(weight.numel() for weight in weights)
                outcomes.append(Outcome(kind, name, elements, *exact, *drift))
    where = conditions()
    command = f"--windows {args.windows} --dtypes {' '.join(args.dtypes)}"
    heading = (
        f"`python -m bench.windows {command}` on {where['date']}: {where['cpu']}, "
        f"{where['threads']} threads, torch {where['torch']}. Windows of Flat-LoRA's noise at "
        f"sigma = {SIGMA} at the end of a cosine ramp, opened and closed in place. The published "
        "algorithm (float32 noise added, then subtracted) ran on the first matrix of each set; its "
        "drift is relative to the weights' norm.\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(outcome) for outcome in outcomes]
    record = {"conditions": where, "windows": args.windows, "rows": rows}
    (args.out / "windows.json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"# {args.windows:,} windows\n\n{heading}\n{table(outcomes)}\n"
    (args.out / "windows.md").write_text(text)
    print(f"\n{heading}\n{table(outcomes)}\nwritten to {args.out}")
    return int(any(outcome.changed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
