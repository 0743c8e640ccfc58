"""A sharded model of PEFT's layers against the same model unsharded, on every rank."""

import functools
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from on_ranks import (
    CLOSE,
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
    mesh_of,
    my_batch,
    resume,
    save,
    train,
    train_to_the_end,
    zeroed,
)
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import adapted, bits, fill, llama, same_bits, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import flatkern
from flatkern.integrations.peft import attach, detach
from flatkern.integrations.transformers import FlatLoRACallback


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.block = Block()

    def forward(self, x):
        return self.block(self.norm(x))


def make_peft(dtype=torch.float32, config=LoraConfig, **options):
    torch.manual_seed(0)
    if config is LoraConfig:
        options = {"r": 3, "lora_alpha": 6} | options
    else:
        options = {"init_r": 3, "target_r": 2, "total_step": 10, "lora_alpha": 6} | options
    config = config(target_modules=["first", "second"], **options)
    model = get_peft_model(Model().to(dtype), config)
    fill(model)
    return model


def block_of(model):
    return model.base_model.model.block


def layers_of(model):
    return [block_of(model).first, block_of(model).second]


# Each adapter as its base: the other factor is on every rank.
PLAN = {
    "first.base_layer": ColwiseParallel(),
    "first.lora_B.*": ColwiseParallel(),
    "second.base_layer": RowwiseParallel(),
    "second.lora_A.*": RowwiseParallel(),
}


def with_tp(model):
    parallelize_module(block_of(model), mesh_of("tp"), PLAN)
    return model


def with_fsdp(model, **options):
    fully_shard(block_of(model), mesh=mesh_of("dp"), **options)
    return fully_shard(model, mesh=mesh_of("dp"), **options)


def with_both(model):
    mesh = mesh_of("dp", "tp")
    parallelize_module(block_of(model), mesh["tp"], PLAN)
    return fully_shard(model, mesh=mesh["dp"])


def with_root_fsdp(model):
    """Keeps what it gathered until the backward."""
    return fully_shard(model, mesh=mesh_of("dp"), reshard_after_forward=False)


CUTS = {"tp": with_tp, "fsdp": with_fsdp, "root": with_root_fsdp, "both": with_both}


def assert_base_is_clean(model, dtype=torch.float32, **options):
    found, right = full_state(model), make_peft(dtype, **options).state_dict()
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert "lora_" in name or torch.equal(found[name], value), name


def assert_trains_alike(cut, rank, mode="virtual", dtype=torch.float32, prepare=None, **options):
    """As one process does, and the base keeps its bits."""
    world = dist.get_world_size()
    noise = {"sigma": 0.3, "seed": 7, "mode": mode}
    models = []
    for shard in (lambda model: model, CUTS[cut]):
        model = make_peft(dtype, **options)
        if prepare is not None:
            prepare(model)
        models.append(shard(model))
    reference, model = models
    expected = train(reference, attach(reference, **noise), batch_of)
    batch = functools.partial(my_batch, cut, rank=rank)
    found = train(model, attach(model, **noise), batch)
    shares = 1 if cut == "tp" else world
    tolerances = CLOSE if dtype == torch.float32 else ROUNDED
    assert_trained_alike(found, expected, shares, **tolerances)
    if prepare is None:
        assert_base_is_clean(model, dtype, **options)


# Four ranks for both; else the shards are those of distributed_checks.py.
@check(*(f"{cut}-{mode}-float32" for cut in CUTS for mode in MODES), ranks=(2,))
@check(*(f"{cut}-virtual-bfloat16" for cut in ("tp", "fsdp")), ranks=(2,))
def peft_trains_as_unsharded(argument, rank, folder):
    cut, mode, dtype = argument.split("-")
    assert_trains_alike(cut, rank, mode, getattr(torch, dtype))


@check(*(f"{kind}-{mode}" for kind in ("dora", "adalora") for mode in MODES), ranks=(2,))
def peft_kinds_train_as_unsharded(argument, rank, folder):
    """Under FSDP: PEFT's own forward of these takes no other shards."""
    kind, mode = argument.split("-")
    options = {"use_dora": True} if kind == "dora" else {"config": AdaLoraConfig}
    assert_trains_alike("fsdp", rank, mode, **options)


@check("tp", "fsdp", ranks=(2,))
def peft_two_adapters_train_as_unsharded(cut, rank, folder):
    def add(model):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
        fill(model)
        model.base_model.set_adapter(["default", "other"])

    assert_trains_alike(cut, rank, prepare=add)


@check(*CUTS)
def peft_noise_is_the_unsharded_noise(cut, rank, folder):
    """Bit for bit with one sigma for all; scales of columns that ranks share within 1 ulp."""
    reference, model = make_peft(), CUTS[cut](make_peft())
    options = {"sigma": 0.3, "mode": "inplace", "strategy": "gaussian", "seed": 7}
    window = attach(model, **options)
    with window.window(), attach(reference, **options).window():
        for layer, right in zip(layers_of(model), layers_of(reference), strict=True):
            assert torch.equal(full(layer.base_layer.weight), right.base_layer.weight)
        assert_same_bits(full_state(model), reference.state_dict())
    assert_same_bits(full_state(model), make_peft().state_dict())
    detach(model)
    detach(reference)
    scales = []
    for each in (reference, model):
        noise = attach(each, sigma=0.3)
        with noise.window():
            scales.append([state.row_scale.clone() for state in noise._states])
    for index, (right, found) in enumerate(zip(*scales, strict=True)):
        columns = cut in ("tp", "both") and index == 1
        assert bits_apart(right, found) <= int(columns), index


@check(*(f"{cut}-{mode}" for cut in ("tp", "fsdp", "root") for mode in MODES), ranks=(2,))
def peft_disabled_adapters(argument, rank, folder):
    cut, mode = argument.split("-")
    model = CUTS[cut](make_peft())
    noise = attach(model, sigma=0.3, mode=mode)
    x = batch_of(0)[0]

    def forward():
        with torch.no_grad(), model.disable_adapter():
            return model(x)

    clean = forward()
    with noise.window():
        if cut != "tp" and mode == "inplace":
            with pytest.raises(RuntimeError, match=r"disabled adapters .* FSDP"):
                forward()
            with noise.paused():
                assert torch.equal(forward(), clean)
        else:
            assert torch.equal(forward(), clean)
        with torch.no_grad():
            assert not torch.equal(model(x), clean)
    assert torch.equal(forward(), clean)


@check(*(f"{cut}-{mode}" for cut in ("tp", "fsdp") for mode in MODES), ranks=(2,))
def peft_late_backward_raises(argument, rank, folder):
    cut, mode = argument.split("-")
    model = CUTS[cut](make_peft())
    noise = attach(model, sigma=0.3, mode=mode)
    with noise.window():
        loss = model(batch_of(0)[0]).sum()
    with pytest.raises(RuntimeError, match=r"inplace operation|after its window was closed"):
        loss.backward()
    dist.barrier()


@check("tp", "fsdp", ranks=(2,))
def peft_refusals(cut, rank, folder):
    model = CUTS[cut](make_peft())
    with pytest.raises(ValueError, match="ranks must be 'same' where weights are sharded"):
        attach(model, ranks="independent")
    attach(model)


def noise_of(model, seed=7):
    return attach(model, sigma=0.3, seed=seed)


@check(ranks=(2,))
def peft_checkpoint_saves(_, rank, folder):
    model = with_fsdp(make_peft())
    noise = noise_of(model)
    train(model, noise, functools.partial(my_batch, "fsdp", rank=rank))
    # In a window: clean all the same.
    with flatkern.WeightNoise(model, sigma=0.3, mode="inplace").window():
        save(model, noise, folder / "peft")


def resumed(batch, folder, cut=lambda model: model):
    model = cut(zeroed(make_peft()))
    found = resume(model, noise_of(model, seed=1), batch, folder / "peft")
    assert_base_is_clean(model)
    return found


def uninterrupted():
    model = make_peft()
    return train_to_the_end(model, noise_of(model))


@check("fsdp", "tp", ranks=(4,))
def peft_checkpoint_resumes(cut, rank, folder):
    found = resumed(functools.partial(my_batch, cut, rank=rank), folder, CUTS[cut])
    assert_trained_alike(found, uninterrupted(), 1 if cut == "tp" else 4)


class Seen(TrainerCallback):
    """The base weights in the middle of each accumulation."""

    def __init__(self):
        self.weights = []

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.weights.append(torch.cat([w.flatten() for w in bits(model, is_base).values()]))


def is_base(name):
    return "base_layer" in name


@check("same", "independent", ranks=(2,))
def trainer_under_ddp(ranks, rank, folder):
    world = dist.get_world_size()
    model = adapted()
    before = bits(model, is_base)
    data = tokens(8)
    flat, seen = FlatLoRACallback(sigma=0.3, seed=5, mode="inplace", ranks=ranks), Seen()
    arguments = TrainingArguments(
        str(folder / f"trainer-{ranks}"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{name: value[i] for name, value in data.items()} for i in range(8)],
        callbacks=[seen],
    )
    flat.add_to(trainer)
    trainer.train()
    assert arguments.world_size == world
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert trainer.state.global_step == 2
    assert same_bits(bits(model, is_base), before)
    clean = torch.cat([value.flatten() for value in before.values()])
    mine = torch.stack(seen.weights)
    assert len(mine) == 2
    # The ramp starts from 0.
    assert torch.equal(mine[0], clean)
    assert not torch.equal(mine[1], clean)
    other = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(other, mine)
    assert torch.equal(*other) == (ranks == "same")
    adapters = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    other = [torch.empty_like(adapters) for _ in range(world)]
    dist.all_gather(other, adapters)
    assert torch.equal(*other)


# Whether PEFT knows of the DTensors of transformers' tensor parallelism.
PLACES_ADAPTERS = getattr(peft.import_utils, "is_transformers_dtensor_tp", False)


def adapted_by_transformers(folder, config):
    """The tiny Llama that transformers has loaded in parallel, with the adapters of `adapted`."""
    reference = adapted(config)
    if dist.get_rank() == 0:
        llama().save_pretrained(folder)
    dist.barrier()
    from transformers.distributed import DistributedConfig

    parallel = DistributedConfig(tp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=parallel)
    model = get_peft_model(model, config)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            # PEFT 0.21.2 declares the width of a part for that of the whole, and fails in forward.
            layer.lora_A["default"].in_features = layer.base_layer.in_features
    values = dict(reference.named_parameters())
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_" in name:
                value = values[name].detach()
                if isinstance(own, DTensor):
                    value = distribute_tensor(value, own.device_mesh, own.placements)
                own.copy_(value)
    return reference, model


@check(*MODES, ranks=(2,) if PLACES_ADAPTERS else ())
def peft_over_transformers_tensor_parallelism(mode, rank, folder):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"])
    reference, model = adapted_by_transformers(folder / f"llama-{mode}", config)
    clean = full_state(model)
    options = {"sigma": 0.3, "seed": 7, "mode": mode}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = attach(model, **options)
    batch = tokens()
    before = model(**batch).loss
    with attach(reference, **options).window(), noise.window():
        expected, found = reference(**batch), model(**batch)
        expected.loss.backward()
        found.loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected.logits, **CLOSE)
            with model.disable_adapter(), reference.disable_adapter():
                right = reference(**batch).logits
                torch.testing.assert_close(model(**batch).logits, right, **CLOSE)
        if mode == "inplace":
            for mine, right in zip(noise._targets, reference_weights(reference), strict=True):
                torch.testing.assert_close(full(mine.weight), right, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    right = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    for name, own in model.named_parameters():
        if own.requires_grad:
            torch.testing.assert_close(full(own.grad), right[name], **CLOSE, msg=name)
    assert_same_bits(full_state(model), clean)
    assert torch.equal(model(**batch).loss, before)
    detach(model)
    assert torch.equal(model(**batch).loss, before)


def reference_weights(model):
    return [value for name, value in model.named_parameters() if is_base(name)]
