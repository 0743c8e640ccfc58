"""What each rank of transformers' Trainer under DDP checks."""

import os
import traceback
from functools import partial

import torch
import torch.distributed as dist
from every_method import EVERY
from tiny import adapted, bits, same_bits
from tiny_trainer import SIGMA, batches_of, is_base, trainer_of
from transformers import Trainer

from flatkern import methods
from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin

WORLD = 2


class MethodTrainer(MethodTrainerMixin, Trainer):
    pass


def of_all_ranks(value):
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def check_the_callback(folder):
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


def check_sam(folder):
    check_method(folder, partial(methods.SAM, rho=0.5))


def check_mezo(folder):
    check_method(folder, partial(methods.MeZO, mu=1e-2), rtol=1e-3)


def check_the_draws_of_lpf_sgd(folder):
    # A micro-batch of either rank has a draw of its own.
    check_method(folder, partial(methods.LPFSGD, sigma=1e-2), in_turn=True)


def check_those_that_keep_gradients_or_draw(folder):
    # Of forwards alone: MeZO. Every method under DDP itself: tests/methods/test_ddp.py.
    for name in ("GSAM", "EntropySGD", "LoRAPro"):
        check_method(folder, EVERY[name], rtol=1e-3, epochs=1, lr=0.2)


def check_method(folder, method, rtol=1e-4, in_turn=False, epochs=2, lr=1e-2):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"num_train_epochs": epochs, "learning_rate": lr}
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
    for _ in range(epochs):
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


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
del CHECKS["check_method"]


def run_rank(rank, world, folder, port):
    """Run the checks; leave what went wrong on this rank in a file for each."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, check in CHECKS.items():
        try:
            check(folder / name)
            found = ""
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{name}-{rank}").write_text(found)
    dist.destroy_process_group()
