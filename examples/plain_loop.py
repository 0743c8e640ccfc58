"""Flat-LoRA in a loop of your own, with accumulation and a resume: python examples/plain_loop.py"""

import sys
from pathlib import Path

import torch
from torch import nn

import flatkern
from flatkern.nn import replace_linear, save_adapter

STEPS, MICRO_BATCHES = 20, 4


def train(folder, stop=STEPS):
    """Train from the checkpoint in `folder`, if there is one, up to step `stop`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))  # or yours, pretrained
    replace_linear(model, "all-linear", r=4, lora_alpha=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    noise = flatkern.WeightNoise(model, sigma=0.05, schedule=flatkern.cosine_ramp(STEPS), seed=0)

    parts = {"model": model, "optimizer": optimizer, "noise": noise}
    checkpoint = Path(folder, "checkpoint.pt")
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for step in range(noise.step, stop):
        data = torch.Generator().manual_seed(step)
        with noise.window():
            for _ in range(MICRO_BATCHES):
                x = torch.randn(32, 16, generator=data)
                loss = nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True))
                (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.3f}", flush=True)

    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    save_adapter(model, Path(folder, "adapter"))
    return model


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "plain-example")
