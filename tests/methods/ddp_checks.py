"""Methods on ranks with batches of their own against one process with all, on every rank."""

import functools
import warnings
from importlib.util import find_spec

import on_ranks
import pytest
import torch
import torch.distributed as dist
from method_cases import CASES, Case, loss_fn_of, make_model, sgd, step_gradients
from on_ranks import check
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flatkern import methods
from flatkern.integrations.galore import galore_adamw

F64 = torch.float64
EQUAL = {"rtol": 1e-9, "atol": 1e-12}
# A difference quotient divides the rounding of a loss by 2 mu.
QUOTIENT = {"rtol": 1e-7, "atol": 1e-10}

# Whatever flatkern.methods has, and options that go other ways.
KINDS = [kind for name in methods.__all__ if isinstance(kind := getattr(methods, name), type)]
# Those with defaults for larger models than this one, a long walk and a large population, are among
# the cases below.
LARGE = (methods.EntropySGD, methods.ES)
EVERY = [Case(kind) for kind in KINDS if kind is not methods.Method and kind not in LARGE]
EVERY += [
    *CASES,
    Case(methods.SAM, {"scope": "merged", "rho": 0.3, "norm": "per_tensor"}),
    Case(methods.LoRASAM, {"norm": "per_tensor"}),
    Case(methods.EFMLoRA, {"norm": "joint", "rho": 0.3}),
    Case(methods.ARWP, {"scope": "merged", "sigma": 0.1, "eta": 50.0, "mode": "inplace"}),
    Case(methods.MixedRWP, {"sigma": 0.1, "lam": 0.3}),
    Case(methods.MixedRWP, {"sigma": 0.1, "lam": 0.0}),
    Case(methods.MixedRWP, {"sigma": 0.1, "lam": 1.0}),
    Case(methods.MixedRWP, {"sigma": 0.1, "strategy": "fisher", "eta": 50.0}),
    Case(methods.MixedRWP, {"sigma": 0.1, "strategy": "fisher", "scope": "merged", "eta": 50.0}),
    Case(methods.LPFSGD, {"sigma": 0.1, "scope": "full"}),
    Case(methods.RWP, {"sigma": 0.1, "max_grad_norm": 0.05}),
    Case(methods.MeZO, {"mu": 0.01, "max_grad_norm": 0.05}),
    Case(methods.SAM, {"scope": "merged", "rho": 0.3, "ascents": 3}),
]
EVERY = list({str((case.type, case.options)): case for case in EVERY}.values())
# Another method than on one process, by definition: docs/distributed.md.
APART = ("last_only", "split", "ranks")
OTHERS = [
    Case(methods.SAM, {"last_only": True}),
    Case(methods.FlatLoRA, {"ranks": "independent", "sigma": 0.3}),
    Case(methods.MixedRWP, {"sigma": 0.1, "split": "last"}),
    Case(methods.MixedRWP, {"sigma": 0.1, "split": "ranks"}),
    Case(methods.MixedRWP, {"sigma": 0.1, "split": "ranks", "strategy": "fisher"}),
]


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def train(model, case, batches, steps=2, wrap=lambda model: model, dtype=F64):
    """The losses, then the trained values."""
    model = wrap(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )
    method = case(model, optimizer)
    with warnings.catch_warnings():
        # A rank that has no batch for a window is not told that it saw no forward.
        warnings.filterwarnings("error", ".*forward never ran")
        losses = [method.step(loss_fn_of(model), batches(step)) for step in range(steps)]
    values = [on_ranks.full(p).flatten() for p in model.parameters() if p.requires_grad]
    return torch.tensor(losses, dtype=dtype), torch.cat(values)


def batches_of(step, count, dtype=F64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(4, 6, generator=generator, dtype=dtype) for _ in range(count)]


def mine(step, own, rank, world, dtype=F64):
    """Every world-th micro-batch: the k-th of all ranks stand beside one another."""
    return batches_of(step, own * world, dtype)[rank::world]


def assert_ranks_agree(values):
    every = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(every, values.contiguous())
    assert all(torch.equal(other, every[0]) for other in every)


def each(cases, function):
    """All of them: a failure says which, and ranks stay in step."""
    found = []
    for case in cases:
        try:
            function(case)
        except AssertionError as error:
            found.append(f"{case}: {error}")
    assert not found, "\n".join(found)


@check()
def every_method_is_that_of_one_process(_, rank, folder):
    world = dist.get_world_size()

    def compare(pair):
        case, own = pair
        found = train(make_model(F64), case, lambda step: mine(step, own, rank, world), wrap=ddp)
        for values in found:
            assert_ranks_agree(values)
        # So that what holds for one of them holds for all.
        if rank == 0:
            one = train(make_model(F64), case, lambda step: batches_of(step, own * world))
            tolerances = EQUAL if case.backward else QUOTIENT
            torch.testing.assert_close(found, one, **tolerances)

    same = [case for case in EVERY if not set(APART) & set(case.options)]
    # Four ranks take twice the time: what options change, two have shown.
    few = [case for case in same if not case.options or "merged" in case.options.values()]
    # Of odd numbers of micro-batches the one in the middle serves both halves.
    counts = {True: (1, 3), False: {2: (2,), 4: (1,)}[world]}
    chosen = same if world == 2 else few
    each([(c, own) for c in chosen for own in counts[c.type is methods.MixedRWP]], compare)


@check()
def ranks_never_come_apart(_, rank, folder):
    """Also where the method is another one than on one process, and in 16 bits."""
    world = dist.get_world_size()

    def compare(case, dtype=F64):
        start = make_model(dtype)
        if dtype != F64:
            for layer in (start[0], start[2]):
                layer.to(dtype)
        for values in train(
            start, case, lambda step: mine(step, 2, rank, world, dtype), 2, ddp, dtype
        ):
            assert_ranks_agree(values)

    each(OTHERS, compare)
    if world == 2:
        coarse = functools.partial(compare, dtype=torch.bfloat16)
        each([case for case in EVERY if not case.options] + OTHERS, coarse)


def mixed_by_hand(lam, batches, options):
    """(1 - lam) times the gradient of even ranks, lam times the noisy one of odd ones."""
    clean, _ = step_gradients(Case(methods.LoRA), make_model(F64), batches[::2])
    noisy, _ = step_gradients(Case(methods.RWP, options), make_model(F64), batches[1::2])
    return {name: (1 - lam) * clean[name] + lam * noisy[name] for name in clean}


@check(ranks=(2, 4))
def clean_and_noisy_ranks(_, rank, folder):
    """2, 3 or 4 of them: either mean is that of its own ranks, however many."""
    options = {"sigma": 0.1, "strategy": "row", "seed": 3}
    for size in range(2, dist.get_world_size() + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            batches = batches_of(0, size)
            case = Case(methods.MixedRWP, {**options, "lam": 0.7, "split": "ranks"})
            model = ddp(make_model(F64), process_group=group)
            found, _ = step_gradients(case, model, [batches[rank]])
            expected = mixed_by_hand(0.7, batches, options)
            for name, right in expected.items():
                torch.testing.assert_close(found[f"module.{name}"], right, **EQUAL)


@check(ranks=(4,))
def three_ranks_are_one_process(_, rank, folder):
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return
    for case in (Case(methods.MixedRWP, {"sigma": 0.1, "lam": 0.3}), Case(methods.LPFSGD)):
        for own in (1, 2):
            one = train(make_model(F64), case, lambda step, n=own: batches_of(step, n * 3))
            wrap = functools.partial(ddp, process_group=group)
            found = train(
                make_model(F64), case, lambda step, n=own: mine(step, n, rank, 3), wrap=wrap
            )
            torch.testing.assert_close(found, one, **EQUAL)


@check(ranks=(2,))
def unequal_numbers_of_micro_batches(_, rank, folder):
    """The mean over ranks of their own means; MixedRWP's halves would not be halves."""
    batches = batches_of(0, 3)
    own = batches[:1] if rank == 0 else batches[1:]
    case = Case(methods.SAM, {"rho": 0.3})
    found, loss = step_gradients(case, ddp(make_model(F64)), own)
    weights = dict(zip(map(id, batches), (1.5, 0.75, 0.75), strict=True))
    model = make_model(F64)
    optimizer, seen = sgd(model, lr=0.0), {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in trained(model)})
    )
    right = case(model, optimizer).step(
        lambda batch: weights[id(batch)] * loss_fn_of(model)(batch), batches
    )
    assert loss == pytest.approx(right, rel=1e-9)
    for name, value in seen.items():
        torch.testing.assert_close(found[f"module.{name}"], value, **EQUAL)
    with pytest.raises(ValueError, match="batches must be as many on every rank, got"):
        step_gradients(Case(methods.MixedRWP), ddp(make_model(F64)), own)


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


SPARSE = [
    ("MixedRWP", {"sigma": 0.3}),
    ("SAM", {}),
    ("ARWP", {}),
    ("MeZO", {}),
    ("GSAM", {}),
    ("FriendlySAM", {}),
    ("GAM", {}),
    ("SmoothOut", {}),
    ("EntropySGD", {"inner_steps": 2}),
    ("ES", {"population": 2}),
]


class Words(nn.Module):
    """An embedding with sparse gradients, and a weight that only some batches use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, sparse=True)
        self.mean = nn.Linear(4, 1)
        self.rare = nn.Parameter(torch.ones(4))
        self.to(F64)

    def forward(self, batch):
        ids, rare = batch
        x = self.words(ids)
        return self.mean(x * self.rare if rare else x).square().mean()


@check(ranks=(2,))
def sparse_gradients_and_weights_without(_, rank, folder):
    """Of the embedding on every rank; of the weight on one."""
    batches = [(torch.tensor([1, 2, 2]), False), (torch.tensor([2, 5, 7]), True)]
    for name, options in SPARSE:
        case = Case(getattr(methods, name), options)
        results = []
        for wrap in (None, functools.partial(ddp, find_unused_parameters=True)):
            model = Words()
            model = model if wrap is None else wrap(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.0)
            method = case(model, optimizer, max_grad_norm=0.1)
            own = batches if wrap is None else batches[rank : rank + 1]
            for _ in range(2):
                method.step(model, own)
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert_ranks_agree(results[1])
        tolerances = EQUAL if name not in ("MeZO", "ES") else QUOTIENT
        torch.testing.assert_close(results[1], results[0], **tolerances)


@check(ranks=(2,))
def a_method_of_what_is_inside_ddp(_, rank, folder):
    model = make_model(F64)
    wrapped = ddp(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("LoRA", "SAM", "MeZO"):
        method = getattr(methods, name)(model, sgd(model))
        with pytest.raises(RuntimeError, match="must be the DistributedDataParallel module"):
            method.step(loss_fn_of(wrapped), batches_of(0, 1))
        # A model of one's own is one process's own, whatever groups there are.
        copy = make_model(F64)
        getattr(methods, name)(copy, sgd(copy)).step(loss_fn_of(copy), batches_of(rank, 1))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@check(ranks=(2, 4))
def over_merged_weights_under_fsdp(_, rank, folder):
    world = dist.get_world_size()

    def cut(model, mesh=None):
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    meshes = [on_ranks.mesh_of("dp")]
    if world == 4:
        # Two groups of two, which hold the same shards.
        meshes.append(on_ranks.mesh_of("dp", "tp"))
    case = Case(methods.SAM, {"scope": "merged", "rho": 0.3})
    one = train(make_model(F64), case, lambda step: batches_of(step, world))
    for mesh in meshes:
        wrap = functools.partial(cut, mesh=mesh)
        found = train(make_model(F64), case, lambda step: mine(step, 1, rank, world), wrap=wrap)
        torch.testing.assert_close(found, one, **EQUAL)


# Those that read or write the weights' shards themselves, or their gradients'.
ON_SHARDS = [
    Case(methods.SAM, {"rho": 0.3, "ascents": 2}),
    Case(methods.GSAM, {"rho": 0.3}),
    Case(methods.FriendlySAM, {"rho": 0.3}),
    Case(methods.GAM, {"rho": 0.3, "alpha": 0.5}),
    Case(methods.FMLoRA, {"rho": 0.3, "transfer": "A"}),
    Case(methods.GMP, {"sigma": 0.1}),
    Case(methods.SmoothOut, {"sigma": 0.1}),
    Case(methods.SmoothOut, {"sigma": 0.1, "strategy": "row"}),
    Case(methods.NoisyTune, {"lam": 0.5}),
    Case(methods.EntropySGD, {"inner_steps": 3, "sigma": 0.1}),
    Case(methods.LoRAPro),
]


@check(ranks=(2,))
def sharded_weights_are_those_of_one_process(_, rank, folder):
    def compare(case):
        found = train(make_model(F64), case, lambda step: mine(step, 1, rank, 2), wrap=fully_shard)
        for values in found:
            assert_ranks_agree(values)
        if rank == 0:
            one = train(make_model(F64), case, lambda step: batches_of(step, 2))
            torch.testing.assert_close(found, one, **EQUAL)

    each(ON_SHARDS, compare)


@check(ranks=(2,))
def what_ranks_that_share_weights_cannot(_, rank, folder):
    case = Case(methods.MixedRWP, {"split": "ranks"})
    for wrap in (lambda model: model, fully_shard):
        with pytest.raises(ValueError, match="split must be 'halves' or 'last' without several"):
            train(make_model(F64), case, lambda step: batches_of(step, 2), wrap=wrap)


def train_by_galore(batches, wrap):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64))
    optimizer = galore_adamw(model, lr=1e-2, rank=2, update_proj_gap=3)
    method = methods.GSAM(model, optimizer, rho=0.3)
    for step in range(5):
        method.step(loss_fn_of(model), batches(step))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


if find_spec("pytorch_optimizer") is not None:

    @check(ranks=(2,))
    def galore_under_a_method(_, rank, folder):
        found = train_by_galore(lambda step: mine(step, 2, rank, 2), ddp)
        assert_ranks_agree(found)
        one = train_by_galore(lambda step: batches_of(step, 4), lambda model: model)
        # Adam divides by moments whose smallest elements are of rounding alone.
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-7)

    @check(ranks=(2,))
    def galore_of_shards_is_refused(_, rank, folder):
        with pytest.raises(ValueError, match="model must not be sharded"):
            train_by_galore(lambda step: mine(step, 2, rank, 2), fully_shard)
