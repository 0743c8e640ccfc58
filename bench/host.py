"""What noisy layers and windows cost the host: `python -m bench.host`.

Forward and backward of one layer, so small that its kernels are nearly free, in time that this
thread was on a core. A GPU's kernels run beside the host, and this is what is left of a step there.
Each arm takes a turn, then all in reverse, over and over; the table has the fastest turn of each,
and the ratio to the same layer outside a window. Below it the table of `bench.host_windows`. On a
GPU, whose backward runs in a thread of its own, the clock is the wall's. Writes bench/results/host;
`--rehearse` takes one turn each and keeps nothing.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn

import flatkern
from bench import host_windows
from bench.run import conditions
from flatkern.integrations import peft as flatkern_peft
from flatkern.nn import LoRALinear
from flatkern.ops import _noisy_linear

RESULTS = Path(__file__).parent / "results" / "host"
SIZE, TOKENS, RANK = 32, 8, 8
# Scratch for a third of the weight: panels of 11, 11 and 10 rows or columns.
PANELS = {"one panel": None, "three panels": 4 * SIZE * SIZE // 3 + 4 * SIZE}


@dataclass(frozen=True)
class Arm:
    """A layer [..., SIZE] to [..., SIZE], and the time that it is measured in."""

    name: str
    outside: str  # the arm that it is compared with
    layer: Callable[[Tensor], Tensor]
    inside: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Outcome:
    """What one arm took; noise of which size of panels, if any."""

    arm: str
    panels: str
    microseconds: float
    ratio: float  # to the same layer outside a window


class PlainLoRA(nn.Module):
    """The fewest calls that make a LoRA layer."""

    def __init__(self) -> None:
        """A frozen nn.Linear and two that are trained."""
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.lora_A = nn.Linear(SIZE, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b + 2 (x A^T) B^T."""
        return self.base(x) + self.lora_B(self.lora_A(x)) * 2.0


def arms(device: str) -> list[Arm]:
    """Layers of one size, in the same state of training."""
    import peft

    own = nn.Sequential(LoRALinear(SIZE, SIZE, r=RANK)).to(device)
    config = peft.LoraConfig(target_modules=["0"], r=RANK)
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), config).to(device)
    noise, attached = flatkern.WeightNoise(own), flatkern_peft.attach(wrapped)
    # The layers themselves: what is around them is not ours.
    layer = wrapped.base_model.model[0]
    return [
        Arm("nn.Linear and LoRA", "nn.Linear and LoRA", PlainLoRA().to(device)),
        Arm("LoRALinear", "LoRALinear", own[0]),
        Arm("LoRALinear, virtual window", "LoRALinear", own[0], noise.window),
        Arm("PEFT's LoRA", "PEFT's LoRA", layer),
        Arm("PEFT's LoRA, virtual window", "PEFT's LoRA", layer, attached.window),
    ]


def turn(arm: Arm, calls: int, device: str) -> float:
    """Seconds of the host for a forward and backward, the mean of `calls`."""
    clock = host_windows.clock_of(device)
    x = torch.randn(TOKENS, SIZE, device=device, requires_grad=True)
    grad = torch.randn(TOKENS, SIZE, device=device)
    with arm.inside():
        for _ in range(3):
            arm.layer(x).backward(grad)
        begin = clock()
        for _ in range(calls):
            arm.layer(x).backward(grad)
        return (clock() - begin) / calls


def layers(rounds: int, calls: int, device: str = "cpu") -> Iterator[Outcome]:
    """One layer of each kind, with the weight in one panel and in three."""
    all_arms = arms(device)
    for name, scratch_bytes in PANELS.items():
        sizes = {device: _noisy_linear.scratch_of(device, scratch_bytes)}
        best: dict[str, float] = {}
        with mock.patch.dict(_noisy_linear._SCRATCH_BYTES, sizes):
            for _ in range(rounds):
                for arm in (*all_arms, *reversed(all_arms)):
                    seconds = turn(arm, calls, device)
                    best[arm.name] = min(seconds, best.get(arm.name, seconds))
        for arm in all_arms:
            if arm.inside is nullcontext and scratch_bytes is not None:
                continue  # outside windows there are no panels
            yield Outcome(arm.name, name, best[arm.name] * 1e6, best[arm.name] / best[arm.outside])


def table(outcomes: list[Outcome]) -> str:
    """Markdown, one row an arm."""
    rows = [
        (
            o.arm,
            o.panels if "window" in o.arm else "",
            f"{o.microseconds:.1f}",
            f"{o.ratio:.2f}",
        )
        for o in outcomes
    ]
    headers = ["layer", "noise", "us", "of the layer outside a window"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure, print the tables, write them with the numbers to the results folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200, help="of each turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="one turn each, nothing kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, calls, counts = args.rounds, args.calls, host_windows.COUNTS
    if args.rehearse:
        rounds, calls, counts = 1, 1, (2,)
    outcomes = [*layers(rounds, calls, args.device)]
    windows = [*host_windows.rows(4 * rounds, args.device, counts)]
    text = f"{table(outcomes)}\n\n{host_windows.HEAD}\n\n{host_windows.table(windows)}"
    print(text)
    if args.rehearse:
        print("rehearsal: nothing was measured, nothing was kept")
        return
    where = conditions()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {"layers": [*map(asdict, outcomes)], "windows": [*map(asdict, windows)]}
    numbers = {"about": where, **rows}
    (args.out / "host.json").write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    on = where["cpu"] if args.device == "cpu" else torch.cuda.get_device_name()
    about = f"{where['date']}, {on}, python {where['python']}, torch {where['torch']}"
    clock = "Thread" if args.device == "cpu" else "Wall"
    (args.out / "host.md").write_text(
        f"`python -m bench.host` on {about}. {clock} time of forward and backward of a\n"
        f"{SIZE}x{SIZE} layer, rank {RANK}, {TOKENS} tokens, float32, the least of "
        f"{2 * args.rounds} turns of {args.calls}.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
