"""transformers' Trainer under DDP against one process by hand, on every rank."""

from functools import partial

import torch
import torch.distributed as dist
from on_ranks import check
from tiny import adapted, bits, same_bits
from tiny_trainer import PEFT_METHODS, SIGMA, batches_of, is_base, trainer_of
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


# What options change, test_method_trainer.py shows.
METHODS = [name for name in PEFT_METHODS if " " not in name]
# A draw or a half of the step for each rank's micro-batch.
IN_TURN = ("LPFSGD", "MixedRWP")
# They divide the difference of two losses in float32 by a small sigma.
DIFFERENCES = ("MeZO", "ES")


@check(*METHODS, ranks=(2,))
def trainer_of_a_method(name, rank, folder):
    method, lr = PEFT_METHODS[name], 0.2
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"num_train_epochs": 1, "learning_rate": lr}
    model, twin, start = (adapted(layers=1) for _ in range(3))
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
        if name in IN_TURN:
            group = [(batch,) for pair in group for batch in pair]
        by_hand.step(lambda own: sum(twin(**batch).loss for batch in own) / len(own), group)
    assert not pairs
    moved, start = 0.0, bits(start)
    atol = 1e-4 if name in DIFFERENCES else 1e-6
    for key, value in bits(twin).items():
        torch.testing.assert_close(bits(model)[key], value, rtol=1e-3, atol=atol)
        moved = max(moved, (value - start[key]).abs().max().item())
    assert moved > 1e-4, moved
    assert all(same_bits(bits(model), other) for other in of_all_ranks(bits(model)))
