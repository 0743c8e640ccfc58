"""transformers' Trainer under DDP against one process by hand, on every rank."""

from functools import partial

import torch
import torch.distributed as dist
from every_method import EVERY
from on_ranks import check
from tiny import adapted, bits, same_bits
from tiny_trainer import SIGMA, batches_of, is_base, trainer_of
from transformers import Trainer

from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin


class MethodTrainer(MethodTrainerMixin, Trainer):
    pass


def of_all_ranks(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@check(ranks=(2,))
def trainer_with_the_callback(_, rank, folder):
    def run(measure):
        model = adapted()
        before = bits(model, is_base)
        flat = FlatLoRACallback(sigma=SIGMA, measure=measure, schedule="constant")
        trainer = trainer_of(folder, model, flat, ddp_backend="gloo")
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert same_bits(bits(model, is_base), before)
        assert all(same_bits(bits(model), other) for other in of_all_ranks(bits(model)))
        assert trainer.state.global_step == 4
        assert ("noise_loss_rise" in trainer.state.log_history[-2]) == measure
        return bits(model)

    assert same_bits(run(True), run(False))


# Two passes, forwards alone, a draw for each rank's micro-batch, and those that keep gradients or
# draw themselves. Every method under DDP itself: ddp_checks.py.
METHODS = {
    "SAM": {},
    "MeZO": {"rtol": 1e-3},
    "LPFSGD": {"in_turn": True},
    "GSAM": {"rtol": 1e-3, "lr": 0.2},
    "EntropySGD": {"rtol": 1e-3, "lr": 0.2},
    "LoRAPro": {"rtol": 1e-3, "lr": 0.2},
}


@check(*METHODS, ranks=(2,))
def trainer_of_a_method(name, rank, folder):
    check_method(folder, EVERY[name], **METHODS[name])


def check_method(folder, method, rtol=1e-4, in_turn=False, lr=1e-2):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"num_train_epochs": 1, "learning_rate": lr}
    model, twin = adapted(), adapted()
    trainer = trainer_of(
        folder, model, kind=partial(MethodTrainer, method=method), ddp_backend="gloo", **options
    )
    order = batches_of(trainer)
    trainer.train()
    # One process by hand: a micro-batch is what the ranks have of it together, or one by one.
    pairs = list(zip(*of_all_ranks(order), strict=True))
    trained = [p for p in twin.parameters() if p.requires_grad]
    by_hand = method(twin, torch.optim.SGD(trained, lr=lr))
    for size in (3, 1):
        group, pairs = pairs[:size], pairs[size:]
        if in_turn:
            group = [(batch,) for pair in group for batch in pair]
        by_hand.step(lambda own: sum(twin(**batch).loss for batch in own) / len(own), group)
    assert not pairs
    moved = 0.0
    start = bits(adapted())
    for name, value in bits(twin).items():
        torch.testing.assert_close(bits(model)[name], value, rtol=rtol, atol=1e-6)
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-4, moved
    assert all(same_bits(bits(model), other) for other in of_all_ranks(bits(model)))
