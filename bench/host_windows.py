"""What the host spends on opening and closing a window, beside its layers' own work.

`python -m bench.host_windows`, and part of `bench.host`: thread CPU time of open + close over
models of 7 and 224 small layers, in multiples of one forward and backward of those layers without a
window. Sizes at which kernels cost little: what remains is the host's. Interleaved, the fastest of
several rounds.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn

import flatkern
from flatkern.nn import replace_linear

COUNTS = (7, 224)
SIZES = (32, 64)
# With 20 the least of a run was up to twice that of the next.
ROUNDS = 160
RANK, SIGMA = 8, 0.05
HEAD = "Opening and closing a window over square layers, beside their own forward and backward."


@dataclass(frozen=True)
class Row:
    """Of one model; times in milliseconds of the host."""

    layers: int
    size: int
    forward_backward: float
    virtual: float
    inplace: float


def small_layers(count: int, size: int) -> nn.Sequential:
    """LoRALinear layers one behind the other, their B away from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))
    replace_linear(model, "all-linear", r=RANK)
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.01)
    return model


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of the host: on the CPU those that this thread was on a core.

    On a GPU the wall's: backward runs in a thread of its own, and a wait is the host's loss.
    """
    return time.thread_time if device == "cpu" else time.perf_counter


def measure(count: int, size: int, rounds: int = ROUNDS, device: str = "cpu") -> Row:
    """One thread, so that none of the work is done on another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Nothing is meant to run in these windows.
            warnings.filterwarnings("ignore", ".*forward never ran")
            return _measure(count, size, rounds, device)
    finally:
        torch.set_num_threads(threads)


def _measure(count: int, size: int, rounds: int, device: str) -> Row:
    model, x = small_layers(count, size).to(device), torch.randn(1, size, device=device)
    clock = clock_of(device)
    noises = {
        mode: flatkern.WeightNoise(model, SIGMA, mode=mode) for mode in ("virtual", "inplace")
    }

    def forward_backward() -> None:
        model(x).sum().backward()

    def open_close(noise: flatkern.WeightNoise) -> Callable[[], None]:
        def run() -> None:
            noise.open()
            noise.close()

        return run

    runs = {"forward_backward": forward_backward}
    runs |= {mode: open_close(noise) for mode, noise in noises.items()}
    fastest = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        order = list(runs) if number % 2 else list(runs)[::-1]
        for name in order:
            if device != "cpu":
                torch.cuda.synchronize()  # what was launched before is not this run's
            begin = clock()
            runs[name]()
            # The first round warms up.
            if number:
                fastest[name] = min(fastest[name], clock() - begin)
    return Row(count, size, **{name: 1e3 * seconds for name, seconds in fastest.items()})


def rows(
    rounds: int = ROUNDS, device: str = "cpu", counts: tuple[int, ...] = COUNTS
) -> Iterator[Row]:
    """Models of so many layers, of each size."""
    for count in counts:
        for size in SIZES:
            yield measure(count, size, rounds, device)


def table(rows: list[Row]) -> str:
    """Open + close in multiples of the layers' own forward and backward."""
    head = (
        "layers",
        "size",
        "forward + backward ms",
        "virtual ms",
        "ratio",
        "in place ms",
        "ratio",
    )
    cells = [
        (
            *(row.layers, row.size, row.forward_backward),
            *(row.virtual, row.virtual / row.forward_backward),
            *(row.inplace, row.inplace / row.forward_backward),
        )
        for row in rows
    ]
    return tabulate(cells, head, floatfmt=".3f", tablefmt="github")


def main() -> None:
    """Print the table."""
    print(f"{HEAD}\n\n{table([*rows()])}")


if __name__ == "__main__":
    main()
