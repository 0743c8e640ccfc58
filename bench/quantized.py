"""PEFT's LoRA layer over quantised bases with and without noise: `python -m bench.quantized`.

A forward and a backward of one layer, the library's own and in a noise window, in turn and then in
the reverse order; the table takes the fastest. On the CPU that is the time that the process was on
a core, all threads added, which a busy neighbour hardly changes. Memory is the peak of one above
what was there.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

# Before torch loads: threads that spin while they wait are counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

from bench.run import conditions
from flatkern._memory import peak_bytes
from flatkern.integrations.peft import attach

FORMATS = ("bfloat16", "torchao int8", "torchao int4", "torchao float8", "bnb nf4", "bnb int8")
SIZE, TOKENS, RANK, SIGMA = 4096, 512, 8, 0.05


def quantized(linear: nn.Linear, form: str) -> nn.Module:
    """A model of one layer, quantised by its library."""
    model = nn.Sequential(linear)
    rows, cols = linear.weight.shape
    if form.startswith("torchao"):
        from torchao import quantization as ao

        config = {
            "torchao int8": ao.Int8WeightOnlyConfig,
            "torchao int4": lambda: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(128)),
            "torchao float8": ao.Float8WeightOnlyConfig,
        }[form]()
        ao.quantize_(model, config)
    elif form.startswith("bnb"):
        import bitsandbytes as bnb

        if form == "bnb nf4":
            model[0] = bnb.nn.Linear4bit(
                cols, rows, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
        else:
            model[0] = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False)
        model[0].load_state_dict(linear.state_dict())
        model = model.to(device=linear.weight.device)
        model.is_loaded_in_4bit = form == "bnb nf4"
        model.is_loaded_in_8bit = form == "bnb int8"
    return model


def measure(form: str, device: torch.device, size: int, tokens: int, rounds: int) -> dict:
    """Seconds of the fastest, peak bytes, and what opening a window costs."""
    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16)
    model = quantized(linear, form)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"]))
    noise = attach(model, SIGMA)
    x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    run = lambda: step(model, x)  # noqa: E731
    open_ = lambda: opened(noise)  # noqa: E731
    run(), open_()
    found = {"clean_bytes": peak_bytes(run, device), "open_bytes": peak_bytes(open_, device)}
    with noise.window():
        run()
        found["noisy_bytes"] = peak_bytes(run, device)
    found |= dict.fromkeys(("clean", "noisy", "open"), math.inf)
    for number in range(2 * rounds):
        for arm in ("clean", "noisy") if number % 2 == 0 else ("noisy", "clean"):
            if arm == "noisy":
                noise.open()
            found[arm] = min(found[arm], timed(run, device))
            noise.close()
        found["open"] = min(found["open"], timed(open_, device))
    return found


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model(x).square().mean().backward()


def opened(noise) -> None:
    """A window with nothing in it: row norms of the weights."""
    with noise.window():
        pass


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds: on this machine's cores, or of a GPU by the wall."""
    cuda = device.type == "cuda"
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    clock = time.perf_counter if cuda else time.process_time
    synchronise()
    begin = clock()
    run()
    synchronise()
    return clock() - begin


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    headers = ["base", "clean ms", "noisy x", "opening x", "clean MiB", "noisy MiB", "opening MiB"]
    lines = []
    for form, found in rows.items():
        times = [f"{found['clean'] * 1e3:.0f}"]
        times += [f"{found[arm] / found['clean']:.2f}" for arm in ("noisy", "open")]
        peaks = [f"{found[f'{arm}_bytes'] / 2**20:.0f}" for arm in ("clean", "noisy", "open")]
        lines.append([form, *times, *peaks])
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, stralign="left")


def main() -> None:
    """Measure every format, print the table, write it with its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="in both orders each")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantized"))
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = {}
    for form in FORMATS:
        rows[form] = measure(form, device, args.size, args.tokens, args.rounds)
        print(f"{form}: {rows[form]}", flush=True)
    text, where = table(rows), conditions()
    on = torch.cuda.get_device_name() if device.type == "cuda" else f"{where['threads']} threads"
    heading = (
        f"`python -m bench.quantized --size {args.size} --tokens {args.tokens}` on "
        f"{where['date']}: {where['cpu']}, {on}, torch "
        f"{where['torch']}; {args.size}x{args.size}, {args.tokens} tokens in bfloat16, rank "
        f"{RANK}; fastest of {2 * args.rounds}, interleaved in both orders, x: multiples of clean. "
        + ("" if device.type == "cuda" else "Times are on cores, all threads added.")
    )
    args.out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"conditions": where, "rows": rows}, indent=1)
    (args.out / f"{device.type}.json").write_text(f"{report}\n")
    (args.out / f"{device.type}.md").write_text(
        f"# Noise over quantised bases\n\n{heading}\n\n{text}\n"
    )
    print(f"\n{heading}\n\n{text}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
