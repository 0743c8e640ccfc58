"""A sharded model of flatkern's layers against the same model unsharded, on every rank."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from on_ranks import (
    CLOSE,
    CUTS,
    HIDDEN,
    IN,
    MODES,
    OUT,
    ROUNDED,
    assert_same_bits,
    assert_trained_alike,
    batch_of,
    bits_apart,
    check,
    full,
    full_state,
    layers_of,
    make_model,
    mesh_of,
    my_batch,
    resume,
    save,
    sgd,
    train,
    train_to_the_end,
    with_ddp,
    with_fsdp,
    zeroed,
)
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.torch_version import TorchVersion

import flatkern
from flatkern.integrations.distributed import LoRAColwise, LoRARowwise
from flatkern.nn import DoRALinear, load_adapter, save_adapter

NAMES = ("tp", "fsdp", "root", "both")


# On four ranks, some of which hold no row, either mode once: writes_the_same_bits and
# virtual_sees_the_same_bits have their noise there, and the shards of root are those of fsdp.
@check("tp-virtual-float32", "fsdp-inplace-float32", *(f"both-{mode}-float32" for mode in MODES))
@check("tp-inplace-float32", "fsdp-virtual-float32", ranks=(2,))
@check(*(f"root-{mode}-float32" for mode in MODES), ranks=(2,))
@check(*(f"{cut}-{mode}-bfloat16" for cut in ("tp", "fsdp") for mode in MODES), ranks=(2,))
def trains_as_unsharded(argument, rank, folder):
    cut, mode, dtype = argument.split("-")
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


@check(*(f"{cut}-float32" for cut in NAMES))
@check(*(f"{cut}-bfloat16" for cut in NAMES), ranks=(2,))
def writes_the_same_bits(argument, rank, folder):
    """With one sigma for all, in place: no norm that could differ."""
    cut, dtype = argument.split("-")
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
    for strategy in ("flat_lora", "row", "matrix"):
        scales = []
        for model in (make_model(), CUTS[cut](make_model())):
            noise = flatkern.WeightNoise(model, sigma=0.3, strategy=strategy)
            with noise.window():
                scales.append([state.row_scale.clone() for state in noise._states])
        for index, (right, found) in enumerate(zip(*scales, strict=True)):
            columns = cut in ("tp", "both") and index == 1
            assert bits_apart(right, found) <= int(columns), (strategy, index)


@check("origin", "full", "all", ranks=(2,))
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


@check(*(f"{cut}-{mode}" for cut in ("tp", "fsdp", "root") for mode in MODES), ranks=(2,))
def late_backward_raises(argument, rank, folder):
    cut, mode = argument.split("-")
    model = CUTS[cut](make_model())
    noise = flatkern.WeightNoise(model, sigma=0.3, mode=mode)
    with noise.window():
        loss = model(batch_of(0)[0]).sum()
    with pytest.raises(RuntimeError, match=r"inplace operation|after its window was closed"):
        loss.backward()
    dist.barrier()


@check("fsdp", "root", ranks=(2,))
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


@check(ranks=(2,))
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


@check("fsdp", "root", ranks=(2,))
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


@check("same", "independent", ranks=(2,))
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
        dist.all_gather_object(keys, [state.key.tolist() for state in noise._states])
    expected_draws = [0 if ranks == "same" else r * 2**16 for r in range(len(keys))]
    assert [key[0][2] for key in keys] == expected_draws
    state = [None] * dist.get_world_size()
    dist.all_gather_object(state, dict(model.module.state_dict()))
    for other in state:
        assert_same_bits(other, state[0])
    frozen = make_model().state_dict()
    for name in frozen:
        assert "lora" in name or torch.equal(state[0][name], frozen[name])


@check(ranks=(2,))
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
        TypeError, match=r"must be of a layer that shows its noise in shards.* got DoRALinear"
    ):
        flatkern.WeightNoise(with_fsdp(make_model(layer=DoRALinear, renorm=True)))
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


def noise_of(model, seed=7):
    return flatkern.WeightNoise(model, sigma=0.3, seed=seed)


@check(ranks=(2,))
def checkpoint_saves(_, rank, folder):
    model = with_fsdp(make_model())
    noise = noise_of(model)
    train(model, noise, functools.partial(my_batch, "fsdp", rank=rank))
    # In a window: clean all the same.
    with flatkern.WeightNoise(model, sigma=0.3, mode="inplace").window():
        save(model, noise, folder / "own")


def resumed(batch, folder, cut=lambda model: model):
    model = cut(zeroed(make_model()))
    found = resume(model, noise_of(model, seed=1), batch, folder / "own")
    frozen, clean = make_model().state_dict(), full_state(model)
    assert all(torch.equal(clean[name], frozen[name]) for name in frozen if "lora" not in name)
    return found


def uninterrupted():
    model = make_model()
    return train_to_the_end(model, noise_of(model))


@check("fsdp", "tp", ranks=(4,))
def checkpoint_resumes(cut, rank, folder):
    found = resumed(functools.partial(my_batch, cut, rank=rank), folder, CUTS[cut])
    assert_trained_alike(found, uninterrupted(), 1 if cut == "tp" else 4)
