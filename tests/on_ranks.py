"""Checks that every rank of a process group runs, what runs them, and a model that they shard."""

import contextlib
import datetime
import functools
import gc
import importlib.util
import io
import os
import runpy
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from flatkern.integrations.distributed import LoRAColwise, LoRARowwise
from flatkern.nn import LoRALinear, replace_linear

IN, HIDDEN, OUT, BATCH, STEPS = 10, 24, 9, 8, 3
# Orders of sums alone: what is summed is the same.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
# Activations and terms of sums are rounded to bfloat16: 2^-9 each.
ROUNDED = {"rtol": 5e-2, "atol": 2e-2}
MODES = ("virtual", "inplace")
WORLDS = (2, 4)
# Ranks fork from a server that has imported these, which takes as long as the checks. One server
# serves all files of tests in a process, with what it was started with.
IMPORTED_ONCE = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
if importlib.util.find_spec("peft") is not None:
    IMPORTED_ONCE += ["peft", "transformers.trainer", "transformers.models.llama.modeling_llama"]
# Of every module that was imported: the module, the numbers of ranks and the function by name.
CHECKS = {}
# A rank that failed leaves the others waiting for it.
PATIENCE = datetime.timedelta(seconds=60)


def check(*arguments, ranks=(2, 4)):
    """Register a check of (argument, rank, folder) for these numbers of ranks."""

    def register(function):
        for argument in arguments or ("",):
            name = f"{function.__name__}-{argument}".removesuffix("-")
            assert name not in CHECKS
            # A mesh of two dimensions takes four.
            own = (4,) if argument.startswith("both") else ranks
            CHECKS[name] = function.__module__, own, functools.partial(function, argument)
        return function

    return register


def checks_of(modules):
    """(number of ranks, name) of each check in these modules, which are imported."""
    for module in modules:
        importlib.import_module(module)
    return [
        (w, n) for w in WORLDS for n, (m, own, _) in CHECKS.items() if m in modules and w in own
    ]


def spawn(function, world, *arguments):
    """Processes of (rank, world, *arguments), which see no GPU: their group is gloo's."""
    # Whoever asks for GPUs starts CUDA, which no fork survives; some of the imports do.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
        torch.multiprocessing.start_processes(
            function, (world, *arguments), nprocs=world, start_method=method
        )


class Runner:
    """Every check of some modules on a number of ranks, in one group of processes, when asked."""

    def __init__(self, folder, modules):
        self.folder, self.modules = folder, modules
        self._done = set()

    def run(self, world):
        if world not in self._done:
            self._done.add(world)
            spawn(run_rank, world, self.folder, self.modules)

    def assert_passed(self, world, name):
        self.run(world)
        for rank in range(world):
            found = (self.folder / f"{name}-{world}-{rank}").read_text()
            assert not found, f"rank {rank}:\n{found}"


def run_rank(rank, world, folder, modules):
    """Run the modules' checks; leave what went wrong on this rank in a file for each."""
    gc.freeze()  # Trainers look for garbage after each run: not among what is imported.
    torch.set_num_threads(1)
    _name_places(rank, world, 0)
    init = f"file://{folder}/store{world}"
    group = {"rank": rank, "world_size": world, "timeout": PATIENCE}
    dist.init_process_group("gloo", init_method=init, **group)
    for name in [name for own, name in checks_of(modules) if own == world]:
        try:
            CHECKS[name][-1](rank, folder)
            found = ""
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{name}-{world}-{rank}").write_text(found)
    dist.destroy_process_group()


def run_example(rank, world, port, path, folder):
    """A script as torchrun runs it, with a store at `port`; what rank 0 prints goes to a file."""
    torch.set_num_threads(1)
    _name_places(rank, world, port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(path))["main"](str(folder))
    (folder / f"output-{rank}").write_text(output.getvalue())


def _name_places(rank, world, port):
    """What torchrun sets, which Trainers read."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ["MASTER_ADDR"] = "localhost"


def make_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(IN), nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT)
    ).to(dtype)
    replace_linear(model, "all-linear", r=3, lora_alpha=6, **options)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lora_B.normal_(std=0.3)
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def mesh_of(*names):
    world = dist.get_world_size()
    return init_device_mesh(
        "cpu", (2, world // 2) if len(names) == 2 else (world,), mesh_dim_names=names
    )


def with_tp(model):
    plan = {"1": LoRAColwise(), "3": LoRARowwise()}
    return parallelize_module(model, mesh_of("tp"), plan)


def with_fsdp(model, **options):
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh_of("dp"), **options)
    return fully_shard(model, mesh=mesh_of("dp"), **options)


def with_root_fsdp(model):
    """Keeps what it gathered until the backward."""
    return fully_shard(model, mesh=mesh_of("dp"), reshard_after_forward=False)


def with_both(model):
    mesh = mesh_of("dp", "tp")
    parallelize_module(model, mesh["tp"], {"1": LoRAColwise(), "3": LoRARowwise()})
    return fully_shard(model, mesh=mesh["dp"])


def with_ddp(model):
    return DistributedDataParallel(model)


CUTS = {
    "tp": with_tp,
    "fsdp": with_fsdp,
    "root": with_root_fsdp,
    "both": with_both,
    "ddp": with_ddp,
}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def full_state(model):
    return {name: full(value) for name, value in model.state_dict().items()}


def batch_of(step, shards=1, shard=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 5, IN, generator=generator)
    y = torch.randn(BATCH, 5, OUT, generator=generator)
    return tuple(part.chunk(shards)[shard] for part in (x, y))


def my_batch(cut, step, rank):
    """Data parallel ranks take a share of the batch, tensor parallel ones all of it."""
    world = dist.get_world_size()
    if cut == "tp":
        return batch_of(step)
    return batch_of(step, 2, rank // (world // 2)) if cut == "both" else batch_of(step, world, rank)


def train(model, noise, batch, steps=range(STEPS)):
    """Losses, last gradients and final values, unsharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = sgd(model)  # AdamW's update of DTensors takes as long as the rest.
    losses = []
    for step in steps:
        x, y = batch(step)
        with noise.window():
            loss = nn.functional.mse_loss(model(x.to(dtype_of(model))).float(), y)
            loss.backward()
        losses.append(loss.item())
        grads = [full(p.grad) for p in trained]
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses), grads, [full(p) for p in trained]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def dtype_of(model):
    return next(iter(model.parameters())).dtype


def assert_trained_alike(found, expected, shares, **tolerances):
    losses = found[0]
    if shares > 1:
        # The mean over the shares of the batch.
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    torch.testing.assert_close(losses, expected[0], **(tolerances or CLOSE))
    for mine, right in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        torch.testing.assert_close(mine, right, **(tolerances or CLOSE))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def bits_apart(a, b):
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _state(model, noise):
    return {"model": get_model_state_dict(model), "noise": noise}


def save(model, noise, folder):
    checkpoint.save(_state(model, noise), checkpoint_id=folder)


def resume(model, noise, batch, folder):
    """Two further steps by SGD from what was saved after STEPS with seed 7."""
    state = _state(model, noise)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    assert noise.step == STEPS
    assert noise.state_dict() == {"seed": 7, "step": STEPS, "noise_version": 1}
    return _further(model, noise, batch)


def train_to_the_end(model, noise):
    """The same steps on one process, uninterrupted."""
    train(model, noise, batch_of)
    return _further(model, noise, batch_of)


def _further(model, noise, batch):
    return train(model, noise, batch, range(STEPS, STEPS + 2))
