"""Thousands of steps of MiniLM under noise: `python -m bench.reliability.soak --steps 6250`.

Trains LoRA on every linear layer of the encoder with windows in both modes and with each way back
to the clean bits, each in a process of its own. Behind all steps no frozen bit may have changed;
memory and step times of the first and the last tenth stand beside each other. Ends with 1 if a bit
changed or memory grew by more than 1 % and 8 MiB. Arms that are done are kept, and the same command
goes on behind them. `--tiny --steps 86400` makes as many steps as a day of one a second, on two
small layers.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

import flatkern
from bench.run import conditions
from flatkern.demo.experiment import FrozenWeights
from flatkern.demo.model import load_pretrained
from flatkern.nn import replace_linear

ARMS = (
    ("virtual", "residual"),
    ("inplace", "residual"),
    ("inplace", "snapshot"),
    ("inplace", "host"),
)
SENTENCES, TOKENS, SIGMA = 1, 8, 0.05


class Tiny(nn.Module):
    """Two layers behind an embedding, called as MiniLM is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20000, 32)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """The last hidden state, for token numbers of any shape."""
        return SimpleNamespace(last_hidden_state=self.layers(self.embedding(input_ids)))


def train(mode: str, restore: str, steps: int, dtype: torch.dtype, tiny: bool) -> dict[str, object]:
    """Figures of one arm."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (Tiny() if tiny else load_pretrained()[0]).to(dtype).requires_grad_(False)
    replace_linear(model, "all-linear", r=8)
    frozen = FrozenWeights(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    noise = flatkern.WeightNoise(
        model,
        SIGMA,
        mode=mode,
        restore=restore,
        schedule=flatkern.cosine_ramp(steps),
    )
    tokens = torch.randint(1000, 20000, (64, SENTENCES, TOKENS))
    statm = Path("/proc/self/statm")
    # Of their size at once: a list would grow.
    seconds, resident = np.full((2, steps), np.nan)
    for step in range(steps):
        start = time.process_time()
        with noise.window():
            hidden = model(input_ids=tokens[step % len(tokens)]).last_hidden_state
            hidden.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds[step] = time.process_time() - start
        resident[step] = int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    tenth = max(1, steps // 10)
    # The first tenth begins behind the steps that allocate.
    first, last = slice(tenth // 2, tenth // 2 + tenth), slice(-tenth, None)
    return {
        "mode": mode,
        "restore": restore,
        "changed bits": frozen.changed(),
        "first MiB": float(resident[first].max()),
        "last MiB": float(resident[last].max()),
        "first ms": 1e3 * float(np.median(seconds[first])),
        "last ms": 1e3 * float(np.median(seconds[last])),
        "finite": all(bool(weight.isfinite().all()) for weight in trained),
    }


def main() -> int:
    """Train every arm, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6250)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tiny", action="store_true", help="small layers instead of MiniLM")
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak"))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{'tiny-' * options.tiny}{options.dtype}-{options.steps}"
    record = options.out / f"{name}.json"
    rows = json.loads(record.read_text()) if record.exists() else []
    done = [(row["mode"], row["restore"]) for row in rows]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for arm in ARMS:
            if arm not in done:
                rows.append(pool.apply(train, (*arm, options.steps, dtype, options.tiny)))
                record.write_text(json.dumps(rows, indent=1) + "\n")
                print(rows[-1], flush=True)
    text = tabulate(
        rows, headers="keys", tablefmt="github", floatfmt=".2f" if options.tiny else ".1f"
    )
    where = conditions()
    heading = (
        f"`python -m bench.reliability.soak{' --tiny' * options.tiny} --steps {options.steps} "
        f"--dtype {options.dtype}` on {where['date']}: {where['cpu']}, torch {where['torch']}, one "
        f"thread. {'Two small layers' if options.tiny else 'The six layers of MiniLM'}, rank 8 on "
        f"each linear layer, sigma {SIGMA} under a cosine ramp, {SENTENCES} x {TOKENS} tokens a "
        "step. Most resident memory and median CPU time of a step, in the first and the last tenth."
    )
    record.with_suffix(".md").write_text(f"# Soak\n\n{heading}\n\n{text}\n")
    print(f"\n{text}")
    grew = any(row["last MiB"] > 1.01 * row["first MiB"] + 8 for row in rows)
    return int(grew or any(row["changed bits"] or not row["finite"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
