"""Train adapters under noise with FSDP2: torchrun --nproc-per-node 2 examples/fsdp2.py"""

import functools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

import flatkern
from flatkern.nn import replace_linear, save_adapter

STEPS = 20


def main(folder):
    """Train, then write a checkpoint and the adapter into `folder`."""
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    block = functools.partial(nn.TransformerEncoderLayer, 64, 4, 128, dropout=0, batch_first=True)
    model = nn.Sequential(block(), block(), nn.Linear(64, 8)).to(device)
    replace_linear(model, ["linear1", "linear2"], r=8)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    noise = flatkern.WeightNoise(model, sigma=0.05, schedule=flatkern.cosine_ramp(STEPS), seed=0)
    data = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        x = torch.randn(16, 10, 64, generator=data).chunk(world)[rank].to(device)
        with noise.window():
            loss = nn.functional.mse_loss(model(x), x[..., :8])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step} loss {loss.item():.4f} sigma {noise.sigma_t:.4f}", flush=True)

    # Both are for any number of ranks: to train on, and the adapter in PEFT's format.
    state = {"model": get_model_state_dict(model), "noise": noise}
    checkpoint.save(state, checkpoint_id=f"{folder}/checkpoint")
    save_adapter(model, f"{folder}/adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "fsdp2-example")
