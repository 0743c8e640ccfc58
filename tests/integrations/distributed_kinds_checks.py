"""Layers of every kind under FSDP2, flatkern's and PEFT's, against the same unsharded."""

import layer_kinds
import pytest
import torch
from layer_kinds import KINDS, Around, inputs, prefix_of
from on_ranks import CLOSE, MODES, assert_same_bits, check, full, full_state, mesh_of, sgd
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import flatkern
from flatkern.integrations.peft import attach
from flatkern.nn import BDALinear, DoRALinear, NoRALinear, replace_linear

LINEAR = {"DoRALinear": DoRALinear, "NoRALinear": NoRALinear, "BDALinear": BDALinear}
# Weights [in, out] have a scale for each column, which shards do not make.
COLUMNS = ("Conv1D", "transposed experts", "silent experts")
# PEFT's attention makes new parameters in every forward.
PEFT = ["embedding", "conv2d", "experts", "table"]
OWN = [*LINEAR, *PEFT, "attention"]
DORA = ["embedding", "conv2d"]


def make_own(kind):
    torch.manual_seed(0)
    if kind in LINEAR:
        model = Around(nn.Linear(8, 6))
        replace_linear(model, ["layer"], r=2, layer=LINEAR[kind])
    else:
        make, names, _, _ = KINDS[kind]
        model = Around(make())
        names = [prefix_of(kind) + name for name in names]
        replace_linear(model, [], r=2, target_parameters=names)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model, model.layer


def make_peft(kind, **options):
    model, _ = layer_kinds.adapted(kind, **options)
    return model, model.base_model.model.layer


def batch_of(kind, rank):
    found = [layer_kinds.X] if kind in LINEAR else inputs(kind)
    return [x.roll(rank, 0 if len(x) > 1 else 1) for x in found]


def train(model, noise, batches):
    """Two steps on the mean loss of the batches; the last outputs and all weights."""
    optimizer = sgd(model)
    for _ in range(2):
        with noise.window():
            results = [model(*batch) for batch in batches]
            loss = sum(result.square().mean() for result in results)
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [result.detach() for result in results], full_state(model)


def compare(rank, kind, make, noise_of, mode, **options):
    noise = {"sigma": 0.3, "mode": mode, "seed": 3}
    model, _ = make(kind, **options)
    results, expected = train(model, noise_of(model, **noise), [batch_of(kind, r) for r in (0, 1)])
    model, inner = make(kind, **options)
    before = full_state(model)
    for part in inner, model:
        fully_shard(part, mesh=mesh_of("dp"))
    found, state = train(model, noise_of(model, **noise), [batch_of(kind, rank)])
    torch.testing.assert_close(found[0], results[rank], **CLOSE)
    assert state.keys() == expected.keys()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert_same_bits({n: state[n] for n in frozen}, {n: before[n] for n in frozen})
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], **CLOSE)


@check(*(f"{kind}-{mode}" for kind in OWN for mode in MODES), ranks=(2,))
def own_kinds(argument, rank, folder):
    kind, mode = argument.rsplit("-", 1)
    compare(rank, kind, make_own, flatkern.WeightNoise, mode)


@check(*(f"{kind}-{mode}" for kind in PEFT for mode in MODES), ranks=(2,))
def peft_kinds(argument, rank, folder):
    kind, mode = argument.rsplit("-", 1)
    compare(rank, kind, make_peft, attach, mode)


@check(*(f"{kind}-{mode}" for kind in DORA for mode in MODES), ranks=(2,))
def peft_dora_kinds(argument, rank, folder):
    kind, mode = argument.rsplit("-", 1)
    compare(rank, kind, make_peft, attach, mode, use_dora=True)


@check(ranks=(2,))
def kinds_that_take_no_shards(_, rank, folder):
    for kind in COLUMNS:
        for make, noise_of in ((make_own, flatkern.WeightNoise), (make_peft, attach)):
            model, _ = make(kind)
            fully_shard(model, mesh=mesh_of("dp"))
            with pytest.raises(ValueError, match=r"without a scale for each output where .*layer"):
                noise_of(model)
    # What tensor parallelism cuts stays cut in the forward.
    model, inner = make_own("embedding")
    placed = distribute_tensor(inner.weight.detach(), mesh_of("tp"), [Shard(0)])
    inner.weight = nn.Parameter(placed, requires_grad=False)
    noise, whole = flatkern.WeightNoise(model), "weight must be whole in the forward of a Embedding"
    with noise.window(), pytest.raises(TypeError, match=whole):
        model(*inputs("embedding"))
    assert torch.equal(full(inner.weight), make_own("embedding")[1].weight)
