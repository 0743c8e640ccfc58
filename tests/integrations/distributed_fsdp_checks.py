"""Options of FSDP2, what is used with it, and DDP's accumulation, on every rank."""

import functools

import pytest
import torch
import torch.distributed as dist
from on_ranks import (
    CLOSE,
    IN,
    MODES,
    ROUNDED,
    assert_same_bits,
    assert_trained_alike,
    batch_of,
    check,
    full_state,
    layers_of,
    make_model,
    my_batch,
    sgd,
    train,
    with_ddp,
    with_fsdp,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn import functional as F

import flatkern


def assert_trains_alike(model, mode, rank, **tolerances):
    """As one process in float32 does, and the base keeps its bits."""
    options = {"sigma": 0.3, "mode": mode, "seed": 7}
    reference = make_model()
    expected = train(reference, flatkern.WeightNoise(reference, **options), batch_of)
    batch = functools.partial(my_batch, "fsdp", rank=rank)
    found = train(model, flatkern.WeightNoise(model, **options), batch)
    assert_trained_alike(found, expected, dist.get_world_size(), **tolerances)
    frozen = {name: value for name, value in full_state(model).items() if "lora" not in name}
    clean = make_model().state_dict()
    assert_same_bits(
        {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in frozen.items()},
        {name: value for name, value in clean.items() if "lora" not in name},
    )


@check(*MODES, ranks=(2,))
def fsdp_mixed_precision(mode, rank, folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert_trains_alike(with_fsdp(make_model(), mp_policy=policy), mode, rank, **ROUNDED)
    # The product with the identity shows the weight that a layer sees.
    options = {"sigma": 0.3, "seed": 7, "mode": mode}
    reference, model = make_model(), make_model()
    layer, right = layers_of(model)[0], layers_of(reference)[0]
    with torch.no_grad():
        for each in (layer, right):
            each.lora_B.zero_()
            each.bias.zero_()
    with_fsdp(model, mp_policy=policy)
    alone = flatkern.WeightNoise(reference, **options)
    with flatkern.WeightNoise(model, **options).window(), torch.no_grad():
        seen = layer(torch.eye(IN)).t()
    with alone.window():
        state, clean = alone._states[0], alone._states[0].clean_weight()
        before, after = (torch.bfloat16, None) if mode == "virtual" else (None, torch.bfloat16)
        expected = flatkern.ops.perturb(clean.to(before or clean.dtype), state.row_scale, state.key)
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, expected.to(after or expected.dtype))


@check(*MODES, ranks=(2,))
def fsdp_cpu_offload(mode, rank, folder):
    model = with_fsdp(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_trains_alike(model, mode, rank)


@check(*MODES, ranks=(2,))
def fsdp_activation_checkpointing(mode, rank, folder):
    model = make_model()
    for index in (1, 3):
        model[index] = checkpoint_wrapper(model[index])
    assert_trains_alike(with_fsdp(model), mode, rank)


@check(ranks=(2,))
def fsdp_compile(_, rank, folder):
    """A layer by itself, compiled once for all its windows."""
    model, counter = make_model(), CompileCounterWithBackend("aot_eager")
    layers_of(model)[1].compile(backend=counter)
    assert_trains_alike(with_fsdp(model), "virtual", rank)
    assert counter.frame_count == 1


@check(ranks=(2,))
def ddp_sums_gradients_once_a_pass(_, rank, folder):
    def loss_of(model):
        return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])

    def count(calls, bucket):
        calls.append(bucket)
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return future.get_future().then(lambda done: done.value()[0])

    # MixedRWP weighs its gradients and takes their mean itself, where no hook of DDP sees it.
    passes = {"FlatLoRA": 1, "LPFSGD": 1, "SAM": 2, "MixedRWP": 0}
    for name, expected in passes.items():
        kind, calls = getattr(flatkern.methods, name), []
        reference, model = make_model(), with_ddp(make_model())
        model.register_comm_hook(calls, count)
        alone = kind(reference, sgd(reference))
        method = kind(model, sgd(model))
        # Each micro-batch of each rank has a number, and with LPFSGD a draw, of its own.
        halves = [my_batch("ddp", i, other) for i in range(4) for other in range(2)]
        right = alone.step(loss_of(reference), halves)
        found = method.step(loss_of(model), [my_batch("ddp", i, rank) for i in range(4)])
        found = torch.tensor(found)
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, torch.tensor(right), **CLOSE, msg=name)
        for mine, other in zip(model.module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, other, **CLOSE, msg=name)
        assert len(calls) == expected, name


class Stack(nn.Module):
    """Experts [k, out, in], or [k, in, out] if they say so; every token through all of them."""

    def __init__(self, experts=4, is_transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(experts, IN, IN))

    def forward(self, x):
        weight = self.weight.mT if self.is_transposed else self.weight
        return F.linear(x, weight.reshape(-1, IN))


@check(ranks=(2,))
def fsdp_stack(_, rank, folder):
    """The noise is that of the whole stack, or refused."""
    options = {"sigma": 0.3, "seed": 7, "scope": "origin"}
    reference, model = Stack(), with_fsdp(nn.Sequential(Stack()))
    x, _ = batch_of(0)
    for restore in (None, "snapshot"):
        alone = flatkern.WeightNoise(reference, restore=restore, **options)
        with alone.window():
            expected = reference.weight.detach().clone()
            result = reference(x).detach()
        noise = flatkern.WeightNoise(model, restore=restore, **options)
        before = model[0].weight.to_local().clone()
        with noise.window():
            assert torch.equal(model[0].weight.full_tensor(), expected)
            assert torch.equal(model(x).detach(), result)
        assert torch.equal(model[0].weight.to_local(), before)
    model = with_fsdp(nn.Sequential(Stack(experts=3)))
    with pytest.raises(ValueError, match=r"0\.weight must be a stack that ranks share evenly"):
        flatkern.WeightNoise(model, **options)
    model = with_fsdp(nn.Sequential(Stack(is_transposed=True)))
    with pytest.raises(ValueError, match=r"without a scale for each output where 0\.weight is"):
        flatkern.WeightNoise(model, **options)
    with flatkern.WeightNoise(model, strategy="gaussian", **options).window():
        model(x)
