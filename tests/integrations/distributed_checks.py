"""What every rank of a process group checks: a sharded model against the same model unsharded."""

import contextlib
import functools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

import flatkern
from flatkern.integrations.distributed import LoRAColwise, LoRARowwise
from flatkern.nn import DoRALinear, LoRALinear, load_adapter, replace_linear, save_adapter

IN, HIDDEN, OUT, BATCH, STEPS = 10, 24, 9, 8, 3
# Orders of sums alone: what is summed is the same.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
# Activations and terms of sums are rounded to bfloat16: 2^-9 each.
ROUNDED = {"rtol": 5e-2, "atol": 2e-2}
CHECKS = {}


def check(*arguments, ranks=(2, 4)):
    """Register a check of (rank, folder, argument) for these numbers of ranks."""

    def register(function):
        for argument in arguments or (None,):
            name = function.__name__ + ("" if argument is None else f"-{argument}")
            CHECKS[name] = ranks, functools.partial(function, argument)
        return function

    return register


def run_rank(rank, world, folder, names):
    """Run the checks; leave what went wrong on this rank in a file for each."""
    torch.set_num_threads(1)
    init = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    for name in names:
        try:
            CHECKS[name][1](rank, folder)
            found = ""
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{name}-{world}-{rank}").write_text(found)
    dist.destroy_process_group()


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
NAMES = ("tp", "fsdp", "root", "both")


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


def train(model, noise, batch, steps=range(STEPS), optimizer=None):
    """Losses, last gradients and final values, unsharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
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


MODES = ("virtual", "inplace")


@check(
    *(f"{cut}-{mode}-float32" for cut in NAMES for mode in MODES),
    *(f"{cut}-{mode}-bfloat16" for cut in ("tp", "fsdp") for mode in MODES),
)
def trains_as_unsharded(argument, rank, folder):
    cut, mode, dtype = argument.split("-")
    if cut == "both" and dist.get_world_size() < 4:
        return
    dtype = getattr(torch, dtype)
    reference = make_model(dtype)
    options = {"sigma": 0.3, "mode": mode, "seed": 7}
    expected = train(reference, flatkern.WeightNoise(reference, **options), batch_of)
    model = CUTS[cut](make_model(dtype))
    noise = flatkern.WeightNoise(model, **options)
    batch = functools.partial(my_batch, cut, rank=rank)
    found = train(model, noise, batch)
    tolerances = CLOSE if dtype == torch.float32 else ROUNDED
    shares = 1 if cut == "tp" else dist.get_world_size()
    assert_trained_alike(found, expected, shares, **tolerances)
    clean, frozen = full_state(model), make_model(dtype).state_dict()
    assert_same_bits(
        {name: value for name, value in clean.items() if "lora" not in name},
        {name: value for name, value in frozen.items() if "lora" not in name},
    )


@check(*(f"{cut}-{dtype}" for cut in NAMES for dtype in ("float32", "bfloat16")))
def writes_the_same_bits(argument, rank, folder):
    """With one sigma for all, in place: no norm that could differ."""
    cut, dtype = argument.split("-")
    if cut == "both" and dist.get_world_size() < 4:
        return
    dtype = getattr(torch, dtype)
    reference = make_model(dtype)
    model = CUTS[cut](make_model(dtype))
    options = {"sigma": 0.3, "mode": "inplace", "strategy": "gaussian", "seed": 7}
    window = flatkern.WeightNoise(model, **options)
    for layer, right in zip(layers_of(model), layers_of(reference), strict=True):
        assert torch.equal(full(layer.weight), right.weight)
    with window.window(), flatkern.WeightNoise(reference, **options).window():
        for layer, right in zip(layers_of(model), layers_of(reference), strict=True):
            assert torch.equal(full(layer.weight), right.weight)
            assert not torch.equal(layer.merged_weight().full_tensor(), right.weight)
        assert_same_bits(full_state(model), reference.state_dict())
    assert_same_bits(full_state(model), make_model(dtype).state_dict())


@check(*NAMES)
def virtual_sees_the_same_bits(cut, rank, folder):
    """Through the product with the identity, every sum of which has one term."""
    if cut == "both" and dist.get_world_size() < 4:
        return
    options = {"sigma": 0.3, "strategy": "gaussian", "seed": 7}
    reference, model = make_model(), CUTS[cut](make_model())
    for layer in [*layers_of(model), *layers_of(reference)]:
        with torch.no_grad():
            layer.lora_B.zero_()
            layer.bias.zero_()
    with flatkern.WeightNoise(model, **options).window():
        if cut in ("root", "both"):
            # Its own pre-forward gathers for all.
            model.unshard()
        with flatkern.WeightNoise(reference, **options).window(), torch.no_grad():
            first = layers_of(model)[0](torch.eye(IN))
            right = layers_of(reference)[0](torch.eye(IN))
            if cut in ("tp", "both"):
                group = mesh_of("dp", "tp")["tp"] if cut == "both" else mesh_of("tp")
                first = DTensor.from_local(first, group, [Shard(1)]).full_tensor()
                eye = distribute_tensor(torch.eye(HIDDEN), group, [Shard(1)]).to_local()
            else:
                eye = torch.eye(HIDDEN)
            assert torch.equal(first, right)
            second = layers_of(model)[1](eye)
            assert torch.equal(second, layers_of(reference)[1](torch.eye(HIDDEN)))


@check(*NAMES)
def scales_of_whole_rows(cut, rank, folder):
    if cut == "both" and dist.get_world_size() < 4:
        return
    for strategy in ("flat_lora", "row", "matrix"):
        scales = []
        for model in (make_model(), CUTS[cut](make_model())):
            noise = flatkern.WeightNoise(model, sigma=0.3, strategy=strategy)
            with noise.window():
                scales.append([target.row_scale.clone() for target in noise._targets])
        for index, (right, found) in enumerate(zip(*scales, strict=True)):
            columns = cut in ("tp", "both") and index == 1
            assert bits_apart(right, found) <= int(columns), (strategy, index)


def bits_apart(a, b):
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


@check("origin", "full", "all")
def other_scopes(scope, rank, folder):
    options = {"sigma": 0.3, "scope": scope, "mode": "inplace"}
    reference, model = make_model(), with_fsdp(make_model())
    noise = flatkern.WeightNoise(model, **options)
    with noise.window(), flatkern.WeightNoise(reference, **options).window():
        for (name, found), right in zip(
            model.named_parameters(), reference.parameters(), strict=True
        ):
            assert torch.equal(full(found), right), name
    assert_same_bits(full_state(model), make_model().state_dict())


@check(*(f"{cut}-{mode}" for cut in ("tp", "fsdp", "root") for mode in ("virtual", "inplace")))
def late_backward_raises(argument, rank, folder):
    cut, mode = argument.split("-")
    model = CUTS[cut](make_model())
    noise = flatkern.WeightNoise(model, sigma=0.3, mode=mode)
    with noise.window():
        loss = model(batch_of(0)[0]).sum()
    with pytest.raises(RuntimeError, match=r"inplace operation|after its window was closed"):
        loss.backward()
    dist.barrier()


@check("fsdp", "root")
def forward_alone_leaves_nothing_gathered(cut, rank, folder):
    """FSDP keeps the root's weights gathered after a forward: noise must not stay in them."""
    x = batch_of(0)[0]
    model = CUTS[cut](make_model())
    noise = flatkern.WeightNoise(model, sigma=0.3, mode="inplace")
    with torch.no_grad():
        clean = model(x)
        with noise.window():
            noisy = model(x)
            with noise.paused():
                assert torch.equal(model(x), clean)
            assert torch.equal(model(x), noisy)
        assert not torch.equal(noisy, clean)
        assert torch.equal(model(x), clean)
    assert_same_bits(full_state(model), make_model().state_dict())


METHODS = ["FlatLoRA", "RWP", "MixedRWP", "LPFSGD", "BAR", "SAM", "ASAM", "LoRASAM"]
if TorchVersion(torch.__version__) >= (2, 14):
    # They take pseudo-inverses, which the oldest torch does not of DTensors.
    METHODS += ["FMLoRA", "EFMLoRA"]


@check("tp", "fsdp", ranks=(2,))
def methods(cut, rank, folder):
    def loss_of(model):
        return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])

    def losses_of(kind, model, batch):
        method = kind(model, sgd(model))
        return torch.tensor([method.step(loss_of(model), [batch(i)]) for i in range(2)])

    for name in METHODS:
        kind = getattr(flatkern.methods, name)
        expected = losses_of(kind, make_model(), batch_of)
        model = CUTS[cut](make_model())
        found = losses_of(kind, model, functools.partial(my_batch, cut, rank=rank))
        if cut != "tp":
            dist.all_reduce(found)
            found /= dist.get_world_size()
        torch.testing.assert_close(found, expected, **CLOSE, msg=name)
    for name, error in (("ARWP", ValueError), ("MeZO", RuntimeError)):
        model = CUTS[cut](make_model())
        with pytest.raises(error, match=r"sharded|DTensor"):
            losses_of(getattr(flatkern.methods, name), model, batch_of)
        assert_same_bits(full_state(model), make_model().state_dict())


@check()
def adapters_in_files(_, rank, folder):
    world = dist.get_world_size()
    saved = make_model()
    for cut in ("tp", "fsdp"):
        save_adapter(CUTS[cut](make_model()), folder / f"{cut}{world}")
        dist.barrier()
        loaded = nn.Sequential(
            nn.LayerNorm(IN), nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT)
        )
        load_adapter(loaded, folder / f"{cut}{world}")
        for layer, right in zip(layers_of(loaded), layers_of(saved), strict=True):
            assert torch.equal(layer.lora_A, right.lora_A)
            assert torch.equal(layer.lora_B, right.lora_B)


@check("fsdp", "root")
def exception_in_a_forward(cut, rank, folder):
    x = batch_of(0)[0]
    model = make_model()
    with torch.no_grad():
        clean = model(x)
    model = CUTS[cut](model)
    noise = flatkern.WeightNoise(model, sigma=0.3, mode="inplace")

    def fail(*args):
        raise KeyboardInterrupt

    hook = model[2].register_forward_hook(fail)
    with contextlib.suppress(KeyboardInterrupt), noise.window():
        model(x)
    hook.remove()
    assert not noise.active
    with torch.no_grad():
        torch.testing.assert_close(model(x), clean, **CLOSE)


@check("same", "independent")
def ddp(ranks, rank, folder):
    reference, model = make_model(), with_ddp(make_model())
    options = {"sigma": 0.3, "seed": 7}
    noise = flatkern.WeightNoise(model, ranks=ranks, **options)
    alone = flatkern.WeightNoise(reference, **options)
    found = train(model, noise, functools.partial(my_batch, "ddp", rank=rank))
    if ranks == "same":
        assert_trained_alike(found, train(reference, alone, batch_of), dist.get_world_size())
    with noise.window(step=5), alone.window(step=5, draw=rank * 0):
        keys = [None] * dist.get_world_size()
        dist.all_gather_object(keys, [target.key.tolist() for target in noise._targets])
    expected_draws = [0 if ranks == "same" else r * 2**16 for r in range(len(keys))]
    assert [key[0][2] for key in keys] == expected_draws
    state = [None] * dist.get_world_size()
    dist.all_gather_object(state, dict(model.module.state_dict()))
    for other in state:
        assert_same_bits(other, state[0])
    frozen = make_model().state_dict()
    for name in frozen:
        assert "lora" in name or torch.equal(state[0][name], frozen[name])


@check()
def refusals(_, rank, folder):
    for cut in ("tp", "fsdp"):
        with pytest.raises(ValueError, match="ranks must be 'same' where weights are sharded"):
            flatkern.WeightNoise(CUTS[cut](make_model()), ranks="independent")
    # Sharded after the window was made.
    model = make_model()
    noise = flatkern.WeightNoise(model, ranks="independent")
    with_fsdp(model)
    with pytest.raises(ValueError, match="ranks must be 'same'"):
        noise.open()
    assert not noise.active
    with pytest.raises(ValueError, match="strategy must be one that needs no Fisher"):
        flatkern.WeightNoise(model, strategy="fisher", fisher=flatkern.noise.fisher.Fisher())
    with pytest.raises(
        TypeError, match="must be of a LoRALinear where it is sharded, got DoRALinear"
    ):
        flatkern.WeightNoise(with_fsdp(make_model(layer=DoRALinear)))
    for style in (LoRAColwise, LoRARowwise):
        with pytest.raises(TypeError, match="must be a LoRALinear, got LayerNorm"):
            parallelize_module(make_model(), mesh_of("tp"), {"0": style()})
        with pytest.raises(ValueError, match="lora_dropout must be 0"):
            parallelize_module(make_model(lora_dropout=0.1), mesh_of("tp"), {"1": style()})
    conv = nn.Conv2d(4, 4, 3)
    placed = distribute_tensor(conv.weight.detach(), mesh_of("tp"), [Shard(1)])
    conv.weight = nn.Parameter(placed)
    with pytest.raises(ValueError, match=r"weight must be sharded in blocks of rows"):
        flatkern.WeightNoise(conv, scope="origin")
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(
        DTensor.from_local(linear.weight.detach(), mesh_of("tp"), [Partial()])
    )
    with pytest.raises(ValueError, match=r"weight must be sharded in blocks of rows"):
        flatkern.WeightNoise(linear, scope="origin")


def _state(model, noise):
    return {"model": get_model_state_dict(model), "noise": noise}


def save(model, noise, folder, optimizer=None):
    dcp.save(_state(model, noise), checkpoint_id=folder / "checkpoint")


def resumed_losses(model, batch, folder):
    """Losses of two further steps by SGD, from the checkpoint."""
    noise = flatkern.WeightNoise(model, sigma=0.3, seed=1)
    state = _state(model, noise)
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    assert noise.step == STEPS
    assert noise.state_dict() == {"seed": 7, "step": STEPS}
    return train(model, noise, batch, range(STEPS, STEPS + 2), sgd(model))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@check(ranks=(2,))
def checkpoint_saves(_, rank, folder):
    model = with_fsdp(make_model())
    noise = flatkern.WeightNoise(model, sigma=0.3, seed=7)
    train(model, noise, functools.partial(my_batch, "fsdp", rank=rank), optimizer=sgd(model))
    # In a window: clean all the same.
    with flatkern.WeightNoise(model, sigma=0.3, mode="inplace").window():
        save(model, noise, folder)


def uninterrupted():
    model = make_model()
    noise = flatkern.WeightNoise(model, sigma=0.3, seed=7)
    train(model, noise, batch_of, optimizer=sgd(model))
    return train(model, noise, batch_of, range(STEPS, STEPS + 2), sgd(model))


@check("fsdp", "tp", ranks=(4,))
def checkpoint_resumes(cut, rank, folder):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model = CUTS[cut](model)
    found = resumed_losses(model, functools.partial(my_batch, cut, rank=rank), folder)
    assert_trained_alike(found, uninterrupted(), 1 if cut == "tp" else 4)
    frozen = make_model().state_dict()
    clean = full_state(model)
    assert all(torch.equal(clean[name], frozen[name]) for name in frozen if "lora" not in name)
