"""MethodTrainerMixin: a Trainer's steps are those of a method on the same micro-batches."""

from functools import partial

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from every_method import EVERY, NEWER
from tiny import adapted, bits, llama, same_bits
from tiny_trainer import batches_of, steps_by_hand, trainer_of
from transformers import Trainer

from flatkern import methods
from flatkern.integrations.transformers import MethodTrainerMixin
from flatkern.nn import replace_linear

# Schedulers say so when they no longer see the optimizer step.
pytestmark = pytest.mark.filterwarnings("error:.*lr_scheduler")

LR = 0.1
CLIP = 0.5


class MethodTrainer(MethodTrainerMixin, Trainer):
    """What users write."""


def lora(dropout=0.0):
    model = llama(layers=1)
    replace_linear(model, ["q_proj", "v_proj"], r=4, lora_alpha=8, lora_dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def method_trainer(folder, model, method, **options):
    """With token counts that differ between micro-batches; also gives the batches it saw."""
    options = {
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
    } | options
    trainer = trainer_of(folder, model, kind=partial(MethodTrainer, method=method), **options)
    for row, example in enumerate(trainer.train_dataset):
        example["labels"] = example["labels"].clone()
        example["labels"][: row % 7] = -100
    return trainer, batches_of(trainer)


# About layers of flatkern's; all others on PEFT's, and without backward where dropout is off.
OWN = ("SAM merged", "LoRASAM", "BAR", "FMLoRA", "EFMLoRA", "FlatLoRA", "LoRAPro")
FORWARDS = ("ES", "MeZO")


def model_of(case):
    if case in FORWARDS:
        return lora(dropout=0.5)
    return lora() if case in OWN else adapted(layers=1)


# Under a scaler of accelerate's the newer ones: a power of two changes no bit.
RUNS = [(case, 4.0 if case in NEWER else None) for case in EVERY]


@pytest.mark.parametrize(("case", "scale"), RUNS, ids=lambda value: value or "")
def test_training_is_the_method_s_own(tmp_path, case, scale):
    method, model, twin = EVERY[case], model_of(case), model_of(case)
    trainer, order = method_trainer(tmp_path, model, method, num_train_epochs=1)
    if scale is not None:
        # accelerate makes one, and unscales by it, only where there is a GPU.
        scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.method.optimizer)
    trainer.train()
    assert len(order) == 8
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=LR)
    by_hand = method(twin.train(), optimizer, max_grad_norm=CLIP)
    losses = steps_by_hand(by_hand, twin, trainer, order, (3, 3, 2))
    assert same_bits(bits(model), bits(twin))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-6)


def test_the_baseline_is_the_plain_trainer(tmp_path):
    model, plain = adapted(), adapted()
    options = {"lr_scheduler_type": "linear", "optim": "adamw_torch"}
    trainer, _ = method_trainer(tmp_path, model, methods.LoRA, **options)
    trainer.train()
    other, _ = method_trainer(tmp_path, plain, methods.LoRA, **options)
    other.__class__ = Trainer
    other.train()
    # The same sums; loss * 3 / 3 rounds once more.
    for name, value in bits(plain).items():
        torch.testing.assert_close(bits(model)[name], value, rtol=1e-4, atol=1e-6)
    for key in ("loss", "grad_norm", "learning_rate"):
        one, two = (
            [entry[key] for entry in each.state.log_history if key in entry]
            for each in (trainer, other)
        )
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("case", ["SAM", "EFMLoRA", "MeZO", "FriendlySAM", "NoisyTune"])
def test_resume_gives_the_same_bits(tmp_path, case):
    method = EVERY[case]

    def run(folder, **train):
        model = model_of(case)
        options = {"save_strategy": "steps", "save_steps": 2}
        trainer, _ = method_trainer(folder, model, method, **options)
        trainer.train(**train)
        return bits(model), trainer.state.global_step

    whole, steps = run(tmp_path)
    resumed, again = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps == again == 6
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("evaluate", ["no", "steps"])
def test_dropout_is_there_after_an_evaluation_too(tmp_path, evaluate):
    model = lora(dropout=0.5)
    options = {"eval_strategy": evaluate, "eval_steps": 1}
    trainer, _ = method_trainer(tmp_path, model, EVERY["SAM"], **options)
    modes = []
    inner = trainer.compute_loss

    def noted(*args, **kwargs):
        loss = inner(*args, **kwargs)
        if torch.is_grad_enabled():
            modes.append(model.training)
        return loss

    trainer.compute_loss = noted
    trainer.train()
    assert len(modes) == 32  # two passes of 16 micro-batches
    assert all(modes)


def test_a_step_that_the_scaler_skips_changes_nothing(tmp_path):
    model = lora()
    kept = {}

    class Overflowing(MethodTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 2:
                kept.setdefault("before", (bits(self.model), self.method.state_dict()))
                return loss * torch.inf
            if self.state.global_step == 3:
                kept.setdefault("after", (bits(self.model), self.method.state_dict()))
            return loss

    method = EVERY["EFMLoRA"]
    trainer, _ = method_trainer(tmp_path, model, method, max_grad_norm=0.0)
    trainer.__class__ = Overflowing
    # accelerate makes one only where there is a GPU.
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert trainer.method.scaler is scaler
    assert scaler.get_scale() == 2.0
    (weights, state), (weights_after, state_after) = kept["before"], kept["after"]
    assert same_bits(weights, weights_after)
    assert state["mean"]
    assert same_bits(state["mean"], state_after["mean"])
    # The learning rate waits as well.
    assert trainer.lr_scheduler.last_epoch == 5


def test_an_exception_between_the_passes_leaves_the_weights_as_they_were(tmp_path):
    model = adapted()
    before = bits(model)
    calls = []

    class Failing(MethodTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(None)
            if len(calls) == 5:
                assert not same_bits(bits(model), before)
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer, _ = method_trainer(tmp_path, model, EVERY["SAM"])
    trainer.__class__ = Failing
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(bits(model), before)
    assert "backward" not in vars(trainer.accelerator)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (partial(methods.SAM, rho=-1.0), ValueError, "SAM: rho must be finite and at least 0"),
        (partial(methods.FlatLoRA, strategy="rows"), ValueError, "strategy must be"),
        (partial(methods.GAM, delta=0.0), ValueError, "GAM: delta must be above 0"),
        (partial(methods.ES, population=3), ValueError, "ES: population must be .* even, got"),
        (partial(methods.SAM, schedule="linear_ramp"), TypeError, "number of optimizer steps"),
        (partial(methods.SAM, rh0=0.1), TypeError, "rh0"),
    ],
    ids=("rho", "strategy", "delta", "population", "schedule", "keyword"),
)
def test_options_are_checked_when_the_trainer_is_made(method, error, text):
    model = llama()
    state = torch.get_rng_state()
    with pytest.raises(error, match=text):
        MethodTrainer(model=model, method=method)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_method_of_one_s_own_is_made_for_its_model_alone(tmp_path):
    class Own(methods.LoRA):
        def __init__(self, model, optimizer, **options):
            assert hasattr(model, "lm_head")
            super().__init__(model, optimizer, **options)

    method_trainer(tmp_path, adapted(), Own)[0].train()


def test_what_cannot_run_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="method"):
        MethodTrainer(model=llama(), method="SAM")
    trainer, _ = method_trainer(tmp_path, llama(), methods.SAM)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "distributed_type", "FSDP")
    with pytest.raises(ValueError, match="distributed_type must be one of"):
        trainer.create_scheduler(1)
