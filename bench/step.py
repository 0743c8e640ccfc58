"""Whole optimizer steps with and without noise: `python -m bench.step`.

One model serves all arms, a step each in turn and then in the reverse order, so that what else the
machine does hits them alike; the table takes the fastest. On the CPU it also gives the time that
the process was on a core, all threads added, which a busy neighbour hardly changes. An arm's
memory is the peak of its first step above weights and optimizer, kept clean bits included.

On a GPU: a decoder block with Llama-2-7B's shapes in bfloat16. On the CPU: a quarter of its widths,
and all of MiniLM. `--rehearse` runs tiny shapes once and measures nothing.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch loads: threads that spin while they wait are counted as work, and slow neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler that counts memory does not log its start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import flatkern
from bench.run import conditions
from flatkern import baselines
from flatkern._memory import peak_bytes
from flatkern.nn import LoRALinear, replace_linear

# "again" is plain LoRA once more: how far its ratio is from 1 is how far any ratio may be off.
ARMS = ("lora", "again", "virtual", "inplace", "published")
MICRO_BATCHES = (1, 4, 16)
RANK, ALPHA, SIGMA, SEED = 8, 16, 0.05, 0
HEAD = 128
# What predictions for an H100 rest on: bfloat16 products, and the bytes that kernels stream.
H100_FLOPS, H100_BYTES = 770e12, 2.7e12


class Block(nn.Module):
    """A decoder block as in Llama 2, without rotary embedding: 4 d^2 + 3 d f weights."""

    def __init__(self, d: int, f: int) -> None:
        """Model width d, a multiple of the heads' 128 or smaller than it; hidden width f."""
        super().__init__()
        self.heads = max(1, d // HEAD)
        self.norm_1, self.norm_2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, f, bias=False) for _ in range(2))
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, d] to the same."""
        h = self.norm_1(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class MiniLM(nn.Module):
    """The demo's encoder, whole: the mean of its last hidden state."""

    def __init__(self) -> None:
        """The pretrained model, from the installed package."""
        from flatkern.demo.model import load_pretrained

        super().__init__()
        self.encoder, _ = load_pretrained()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] to features [batch, d]."""
        return self.encoder(input_ids=ids).last_hidden_state.mean(1)


@dataclass(frozen=True)
class Case:
    """One line of the table: a model, its dtype, and the micro-batches of a step."""

    model: str
    dtype: str
    tokens: int
    micro_batches: int


def block_name(d: int, f: int) -> str:
    return f"block {d}/{f}"


def plan(device: str, rehearse: bool) -> list[Case]:
    """Every case of a complete run."""
    if rehearse:
        return [Case(block_name(64, 96), "bfloat16", 8, 2)]
    if device == "cuda":
        models = [(block_name(4096, 11008), "bfloat16", tokens) for tokens in (512, 2048, 8192)]
    else:
        block = block_name(1024, 2816)
        models = [("MiniLM", "float32", 128), (block, "float32", 256), (block, "bfloat16", 256)]
    return [Case(*model, count) for model, count in itertools.product(models, MICRO_BATCHES)]


def build(case: Case, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The model with adapters on every linear layer, and a micro-batch."""
    torch.manual_seed(SEED)
    with device:
        if case.model == "MiniLM":
            model, sentence = MiniLM(), 32
            batch = torch.randint(1000, 20000, (case.tokens // sentence, sentence))
        else:
            d, f = map(int, case.model.removeprefix("block ").split("/"))
            model = Block(d, f)
            # Sequences of at most 2048 tokens.
            sequence = min(case.tokens, 2048)
            batch = torch.randn(case.tokens // sequence, sequence, d)
    dtype = getattr(torch, case.dtype)
    model = model.to(device, dtype)
    replace_linear(model, "all-linear", r=RANK, lora_alpha=ALPHA)
    batch = batch.to(device, dtype if batch.is_floating_point() else None)
    return model.train(), batch


class Steps:
    """One optimizer step of each arm on one model."""

    def __init__(self, model: nn.Module, batch: Tensor, micro_batches: int) -> None:
        """Adapters get AdamW; nothing else is trained."""
        self.model, self.micro_batches, self._batch = model, micro_batches, batch
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self._windows = self.windows()

    def windows(self) -> dict[str, flatkern.WeightNoise]:
        """The noise of each mode."""
        modes = ("virtual", "inplace")
        return {mode: flatkern.WeightNoise(self.model, SIGMA, mode=mode) for mode in modes}

    def operands(self) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """W, A, B and s of every adapted layer, for the published algorithm."""
        layers = [m for m in self.model.modules() if isinstance(m, LoRALinear)]
        return [
            (m.weight.detach(), m.lora_A.detach(), m.lora_B.detach(), m.scaling) for m in layers
        ]

    def loss(self) -> Tensor:
        """Of a micro-batch."""
        return self.model(self._batch).float().square().mean()

    def run(self, arm: str) -> None:
        """Gradients of all micro-batches under the arm's noise, then the update."""
        if arm in self._windows:
            with self._windows[arm].window():
                self._gradients()
        elif arm == "published":
            layers = self.operands()
            norms = [baselines.published_perturb_(*layer, SIGMA, SEED) for layer in layers]
            self._gradients()
            for (weight, *_), norm in zip(layers, norms, strict=True):
                baselines.published_restore_(weight, norm, SIGMA, SEED)
        else:
            self._gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _gradients(self) -> None:
        for _ in range(self.micro_batches):
            (self.loss() / self.micro_batches).backward()


def measure(steps: Steps, device: torch.device, rounds: int, limit_s: float) -> dict[str, dict]:
    """Seconds of the fastest step and peak bytes of the first, by arm.

    `rounds` in both orders, or after the third as many as begin within `limit_s` seconds.
    """
    # The optimizer's state is nobody's.
    steps.run("lora")
    clean = {name: p.detach().clone() for name, p in frozen(steps)}
    found = {}
    for arm in ARMS:
        peak = peak_bytes(lambda arm=arm: steps.run(arm), device)
        found[arm] = {"peak_bytes": peak, "seconds": math.inf, "core_seconds": math.inf}
        if arm != "published":
            assert all(torch.equal(p, clean[name]) for name, p in frozen(steps)), arm
    del clean
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > limit_s:
            break
        for order in (ARMS, ARMS[::-1]):
            for arm in order:
                seconds, core_seconds = timed(lambda arm=arm: steps.run(arm), device)
                found[arm]["seconds"] = min(found[arm]["seconds"], seconds)
                found[arm]["core_seconds"] = min(found[arm]["core_seconds"], core_seconds)
                found[arm]["steps"] = 2 * (number + 1)
    return found


def frozen(steps: Steps) -> Iterator[tuple[str, Tensor]]:
    """The weights that no arm may leave changed, but the published one, which does."""
    return ((n, p) for n, p in steps.model.named_parameters() if not p.requires_grad)


def timed(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of one step by the wall, the device's work included, and on this machine's cores."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begin, core_begin = time.perf_counter(), time.process_time()
    run()
    synchronise()
    return time.perf_counter() - begin, time.process_time() - core_begin


def predicted(case: Case, arm: str) -> float | None:
    """What an arm's step on an H100 should cost, as a multiple of plain LoRA's.

    Products forward and backward against bytes: a virtual window reads and writes every bfloat16
    weight in both passes of each micro-batch (8 bytes an element); an in-place one copies, writes
    and copies back once (12). Both read it once for its norms (2).
    """
    if not case.model.startswith("block") or arm not in ("virtual", "inplace"):
        return None
    d, f = map(int, case.model.removeprefix("block ").split("/"))
    elements = 4 * d * d + 3 * d * f
    products = 4 * case.tokens * elements * case.micro_batches / H100_FLOPS
    per_element = 2 + (8 * case.micro_batches if arm == "virtual" else 12)
    return 1 + per_element * elements / H100_BYTES / products


def table(rows: dict[Case, dict], device: str) -> str:
    """Markdown: plain LoRA's time, each arm as a multiple of it, and peak memory."""
    cuda = device == "cuda"
    headers = ["model", "dtype", "tokens", "micro-batches", "lora ms"]
    headers += [f"{arm} x" if cuda else f"{arm} x (on cores)" for arm in ARMS[1:]]
    headers += ["predicted virtual x", "predicted inplace x"] if cuda else []
    lines = []
    for case, found in rows.items():
        line = [case.model, case.dtype, case.tokens, case.micro_batches]
        line.append(f"{found['lora']['seconds'] * 1e3:.1f}" if found else "")
        for arm in ARMS[1:]:
            wall, core = (
                f"{found[arm][clock] / found['lora'][clock]:.2f}" if found else ""
                for clock in ("seconds", "core_seconds")
            )
            line.append(wall if cuda else f"{wall} ({core})")
        if cuda:
            line += [f"{predicted(case, arm):.2f}" for arm in ("virtual", "inplace")]
        lines.append(
            line + [f"{found[arm]['peak_bytes'] / 2**20:.1f}" if found else "" for arm in ARMS]
        )
    headers += [f"{arm} MiB" for arm in ARMS]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, stralign="left")


def main() -> None:
    """Measure every case, print the table, write it with its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="in both orders each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a row's rounds")
    parser.add_argument("--out", type=Path, default=Path("bench/results/step"))
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, nothing kept")
    parser.add_argument("--predict", action="store_true", help="a GPU's table without outcomes")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: dict[Case, dict] = {}
    if args.predict:
        print(table({case: {} for case in plan("cuda", False)}, "cuda"))
        return
    for case in plan(device.type, args.rehearse):
        steps = Steps(*build(case, device), case.micro_batches)
        rows[case] = measure(steps, device, 1 if args.rehearse else args.rounds, args.limit)
        print(f"{case}: {rows[case]}", flush=True)
    text = table(rows, device.type)
    if args.rehearse:
        print("rehearsal: nothing was measured, nothing was kept")
        return
    where = conditions()
    on = torch.cuda.get_device_name() if device.type == "cuda" else f"{where['threads']} threads"
    heading = (
        f"`python -m bench.step --rounds {args.rounds}` on {where['date']}: {where['cpu']}, {on}, "
        f"torch {where['torch']}, rank {RANK} on every linear layer. Fastest of up to "
        f"{2 * args.rounds} steps (fewer where {args.limit:.0f} s were over), arms interleaved "
        "in both orders; `again` is plain LoRA a second time, whose distance from 1 is that of the "
        "measurement. Peak memory of a first step above weights and optimizer."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    record = [asdict(case) | {"arms": found} for case, found in rows.items()]
    report = json.dumps({"conditions": where, "rows": record}, indent=1)
    (args.out / f"{device.type}.json").write_text(f"{report}\n")
    (args.out / f"{device.type}.md").write_text(f"# Whole optimizer steps\n\n{heading}\n\n{text}\n")
    print(f"\n{heading}\n\n{text}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
