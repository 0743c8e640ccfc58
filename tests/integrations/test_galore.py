"""GaLore's optimizer through flatkern's methods, against its algorithm in float64."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from flatkern.integrations.galore import galore_adamw
from flatkern.methods import GSAM, SAM, FlatLoRA, LoRA
from flatkern.nn import replace_linear

F64 = torch.float64


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64)


def batches_of(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 6, generator=generator, dtype=F64) for _ in range(2)]


def loss_fn_of(model):
    return lambda batch: model(batch).square().mean()


def by_hand(steps, lr, rank, gap, scale):
    """Algorithm 2 of the source with AdamW's moments, for every weight and bias."""
    model = make_model()
    moments = {name: None for name, _ in model.named_parameters()}
    for step in range(1, steps + 1):
        batches = batches_of(step)
        loss = sum(loss_fn_of(model)(batch) for batch in batches) / len(batches)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        for (name, p), G in zip(model.named_parameters(), slopes, strict=True):
            projected = p.dim() == 2 and min(p.shape) > rank
            state = moments[name] = moments[name] or {"m": 0, "v": 0}
            if projected:
                if "P" not in state or step % gap == 0:
                    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
                    state["P"] = Vh[:rank].t() if G.shape[0] >= G.shape[1] else U[:, :rank]
                P, right = state["P"], G.shape[0] >= G.shape[1]
            R = (G @ P if right else P.t() @ G) if projected else G
            state["m"] = 0.9 * state["m"] + 0.1 * R
            state["v"] = 0.999 * state["v"] + 0.001 * R.square()
            N = state["m"] / (state["v"].sqrt() + 1e-6)
            if projected:
                N = scale * (N @ P.t() if right else P @ N)
            rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            with torch.no_grad():
                p -= rate * N
    return model


def test_it_follows_the_algorithm():
    pytest.importorskip("pytorch_optimizer")
    options = {"rank": 2, "update_proj_gap": 3, "scale": 0.5}
    model = make_model()
    method = LoRA(model, galore_adamw(model, lr=1e-2, **options))
    for step in range(1, 6):
        method.step(loss_fn_of(model), batches_of(step))
    expected = by_hand(5, 1e-2, 2, 3, 0.5)
    for found, right in zip(model.parameters(), expected.parameters(), strict=True):
        # Adam divides by moments whose smallest elements are of rounding alone.
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_a_step_has_the_rank_and_needs_moments_of_it_alone():
    pytest.importorskip("pytorch_optimizer")
    model = make_model()
    before = model[0].weight.detach().clone()
    optimizer = galore_adamw(model, lr=1e-2, rank=2)
    SAM(model, optimizer).step(loss_fn_of(model), batches_of(1))
    move = model[0].weight.detach() - before
    assert torch.linalg.matrix_rank(move, rtol=1e-9) == 2
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, TypeError),
        ({"rank": 6}, ValueError),
        ({"update_proj_gap": 0}, ValueError),
        ({"scale": 0.0}, ValueError),
        ({"lr": -1.0}, ValueError),
        ({"lr": "1"}, TypeError),
    ],
    ids=str,
)
def test_options_are_checked(options, error):
    if options == {"rank": 6}:
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises(error, match=next(iter(options))):
        galore_adamw(make_model(), **{"lr": 0.1, "rank": 2, **options})


def test_adapters_have_nothing_to_project():
    pytest.importorskip("pytorch_optimizer")
    model = make_model()
    replace_linear(model, "all-linear", r=2)
    with pytest.raises(ValueError, match="model must have trainable weights of linear layers"):
        FlatLoRA(model, galore_adamw(model, lr=0.1, rank=2))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pip install pytorch-optimizer"):
        galore_adamw(make_model(), lr=0.1, rank=2)


@pytest.mark.usefixtures("own_accelerate")
def test_prepared_by_accelerate_it_is_the_same():
    pytest.importorskip("pytorch_optimizer")
    accelerate = pytest.importorskip("accelerate")
    found = []
    for prepare in (False, True):
        model = make_model()
        optimizer = galore_adamw(model, lr=1e-2, rank=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if prepare else None
        if prepare:
            model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
            optimizer = optimizer.optimizer
        method = GSAM(model, optimizer, rho=0.3, scaler=scaler)
        for step in range(3):
            method.step(loss_fn_of(model), batches_of(step))
        found.append([p.detach().clone() for p in model.parameters()])
    # SAM's 1e-12 beside a norm counts a little less where gradients are scaled.
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("own_accelerate")
def test_as_the_trainer_s_optimizer(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("peft", reason="tiny needs it")
    from tiny import bits, llama, same_bits
    from tiny_trainer import batches_of as batches_seen
    from tiny_trainer import steps_by_hand, trainer_of
    from transformers import Trainer

    from flatkern.integrations.transformers import MethodTrainerMixin

    class MethodTrainer(MethodTrainerMixin, Trainer):
        pass

    model, twin = llama(layers=1), llama(layers=1)
    optimizers = tuple(galore_adamw(each, lr=1e-2, rank=4) for each in (model, twin))
    kind = partial(MethodTrainer, method=GSAM, optimizers=(optimizers[0], None))
    options = {"max_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, model, kind=kind, **options)
    order = batches_seen(trainer)
    trainer.train()
    by_hand = GSAM(twin.train(), optimizers[1])
    steps_by_hand(by_hand, twin, trainer, order, (3, 3))
    assert same_bits(bits(model), bits(twin))
    assert not same_bits(bits(model), bits(llama(layers=1)))
