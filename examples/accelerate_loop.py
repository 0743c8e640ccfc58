"""Flat-LoRA in a loop with accelerate: accelerate launch examples/accelerate_loop.py"""

import contextlib
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import flatkern
from flatkern.nn import replace_linear, save_adapter

EPOCHS, ACCUMULATION = 3, 4


def main(folder, **options):
    """Train, then write a checkpoint and the adapter into `folder`."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, **options)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))  # or yours, pretrained
    replace_linear(model, "all-linear", r=4, lora_alpha=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(torch.randn(320, 16), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    steps = EPOCHS * -(-len(loader) // ACCUMULATION)
    noise = flatkern.WeightNoise(model, sigma=0.05, schedule=flatkern.cosine_ramp(steps), seed=0)
    accelerator.register_for_checkpointing(noise)  # its step, in save_state and load_state
    with contextlib.closing(noise):  # exact weights on any exit
        for epoch in range(EPOCHS):
            for x in loader:
                with accelerator.accumulate(model):
                    if not noise.active:  # the first micro-batch of an optimizer step
                        noise.open()
                    loss = nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:  # the last one
                        noise.close()
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.print(f"epoch {epoch} loss {loss.item():.3f} sigma {noise.sigma_t:.3f}")

    accelerator.save_state(f"{folder}/checkpoint")
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(model), f"{folder}/adapter")
    return noise


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "accelerate-example")
