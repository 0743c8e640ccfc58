"""A model of Llama-2-7B's shapes under PEFT, with and without noise: `python -m bench.llama`.

Random bfloat16 weights, LoRA on all seven linear layers of a block. Whole optimizer steps of plain
LoRA, both modes and the published algorithm, interleaved as in bench.step, on one sequence a
micro-batch. `--rehearse` runs tiny shapes once on the CPU and measures nothing.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.run import conditions
from bench.step import ARMS, MICRO_BATCHES, SEED, SIGMA, Steps, measure
from flatkern.integrations.peft import attach
from flatkern.noise import WeightNoise

RANK, ALPHA = 16, 32
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def build(
    device: torch.device, layers: int, widths: dict[str, int], vocabulary: int
) -> torch.nn.Module:
    """The PEFT model, every adapter away from its zero."""
    torch.manual_seed(SEED)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **widths)
    with device:
        base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(target_modules=PROJECTIONS, r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
    return get_peft_model(base, lora).train()


class PeftSteps(Steps):
    """One optimizer step of each arm on one PEFT model."""

    def windows(self) -> dict[str, WeightNoise]:
        """The noise of each mode, on layers that are attached once."""
        virtual = attach(self.model, SIGMA, mode="virtual")
        return {"virtual": virtual, "inplace": WeightNoise(self.model, SIGMA, mode="inplace")}

    def operands(self) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """W, A, B and s of every adapted layer."""
        return [
            (
                layer.base_layer.weight.detach(),
                layer.lora_A["default"].weight.detach(),
                layer.lora_B["default"].weight.detach(),
                layer.scaling["default"],
            )
            for layer in self.model.modules()
            if hasattr(layer, "lora_A")
        ]

    def loss(self) -> Tensor:
        """Next-token loss of one sequence."""
        return self.model(input_ids=self._batch, labels=self._batch).loss


def table(rows: dict[int, dict]) -> str:
    """Markdown: a row for each number of micro-batches."""
    headers = ["micro-batches", "lora ms", *(f"{arm} x" for arm in ARMS[1:])]
    headers += ["lora GiB", *(f"{arm} +GiB" for arm in ARMS[1:])]
    lines = []
    for count, found in rows.items():
        plain = found["lora"]
        times = [f"{found[arm]['seconds'] / plain['seconds']:.2f}" for arm in ARMS[1:]]
        peaks = [
            f"{(found[arm]['peak_bytes'] - plain['peak_bytes']) / 2**30:+.2f}" for arm in ARMS[1:]
        ]
        own = [count, f"{plain['seconds'] * 1e3:.1f}"]
        lines.append([*own, *times, f"{plain['peak_bytes'] / 2**30:.2f}", *peaks])
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure, print the table, write it with its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="blocks; fewer fit smaller GPUs")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="in both orders each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a row's rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/llama"))
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, nothing kept")
    args = parser.parse_args()
    device = torch.device("cpu" if args.rehearse else args.device)
    layers, tokens, widths, vocabulary = args.layers, args.tokens, WIDTHS, 32000
    if args.rehearse:
        layers, tokens, widths, vocabulary = 2, 16, TINY, 64
    model = build(device, layers, widths, vocabulary)
    batch = torch.randint(vocabulary, (1, tokens), device=device)
    rows = {}
    steps = PeftSteps(model, batch, 1)
    for steps.micro_batches in (2,) if args.rehearse else MICRO_BATCHES:
        found = measure(steps, device, 1 if args.rehearse else args.rounds, args.limit)
        rows[steps.micro_batches] = found
        print(f"{steps.micro_batches} micro-batches: {found}", flush=True)
    text = table(rows)
    if args.rehearse:
        print(f"{text}\nrehearsal: nothing was measured, nothing was kept")
        return
    where = conditions()
    on = torch.cuda.get_device_name() if device.type == "cuda" else where["cpu"]
    heading = (
        f"`python -m bench.llama --layers {layers} --tokens {tokens}` on {where['date']}: {on}, "
        f"torch {where['torch']}. {layers} blocks of Llama-2-7B's shapes in bfloat16 under PEFT, "
        f"rank {RANK}, sigma {SIGMA}. Fastest of at most {2 * args.rounds} interleaved steps; peak "
        "memory of a first step above weights and optimizer."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"conditions": where, "layers": layers, "rows": rows}, indent=1)
    (args.out / f"{device.type}.json").write_text(f"{report}\n")
    (args.out / f"{device.type}.md").write_text(f"{heading}\n\n{text}\n")
    print(f"\n{heading}\n\n{text}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
