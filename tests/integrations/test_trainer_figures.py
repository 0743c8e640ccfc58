"""What FlatLoRACallback measures: the right number, at the right steps, and at no cost in bits."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft import LoraConfig
from tiny import adapted, bits, same_bits
from tiny_trainer import MODES, SIGMA, trainer_of
from torch import nn
from transformers import TrainerCallback

import flatkern
from flatkern.integrations._run import loss_rise
from flatkern.integrations.peft import attach
from flatkern.integrations.transformers import FlatLoRACallback
from flatkern.nn import replace_linear


def dropped(p):
    return adapted(LoraConfig(r=4, lora_dropout=p, target_modules=["q_proj", "v_proj"]))


def uneven(trainer):
    """Of each example some tokens have no label, of the first ones more; returns the batches."""
    order = []
    for row, example in enumerate(trainer.train_dataset):
        example["labels"] = example["labels"].clone()
        example["labels"][: row % 7] = -100
    collate = trainer.data_collator

    def noted(examples):
        order.append(collate(examples))
        return order[-1]

    trainer.data_collator = noted
    return order


def rises(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {e["step"]: e["noise_loss_rise"] for e in entries if "noise_loss_rise" in e}


@pytest.mark.parametrize("mode", MODES)
def test_the_rise_is_that_of_the_first_micro_batch(tmp_path, mode):
    kept = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with flat.noise.paused():
                kept[state.global_step] = bits(model)

    flat = FlatLoRACallback(sigma=SIGMA, seed=5, mode=mode, schedule="constant")
    model, forwards = adapted(), []
    model.get_base_model().register_forward_pre_hook(lambda *args: forwards.append(None))
    trainer = trainer_of(tmp_path, model, flat, [Keep()], logging_steps=2, num_train_epochs=1)
    order = uneven(trainer)
    trainer.train()
    assert list(rises(trainer)) == [2]
    assert len(forwards) == len(order) + 2
    twin = adapted()
    twin.load_state_dict(kept[1], strict=False)
    noise = attach(twin, SIGMA, seed=5)
    with torch.no_grad(), noise.window(step=1):
        rise = twin(**order[3]).loss.item()
        with noise.paused():
            rise -= twin(**order[3]).loss.item()
    assert rise != 0
    # The losses are about 4; their difference has their rounding.
    assert rises(trainer)[2] == pytest.approx(rise, abs=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "inplace"},
        {"bf16": True},
        {"bf16": True, "mode": "inplace"},
        {"gradient_checkpointing": True},
        {"mode": "inplace", "gradient_checkpointing": True},
        {"logging_first_step": True, "logging_steps": 2},
    ],
    ids=str,
)
def test_it_changes_no_bit_of_the_training(tmp_path, options):
    def run(measure):
        flat = FlatLoRACallback(
            sigma=SIGMA, measure=measure, schedule="constant", mode=options.get("mode", "virtual")
        )
        others = {key: value for key, value in options.items() if key != "mode"}
        model = dropped(0.3)
        start = bits(model)
        trainer = trainer_of(tmp_path, model, flat, num_train_epochs=1, **others)
        trainer.train()
        assert not same_bits(bits(model), start)
        return bits(model), trainer

    measured, trainer = run(True)
    plain, other = run(False)
    assert same_bits(measured, plain)
    assert not rises(other)
    every = options.get("logging_steps", 1)
    expected = [s for s in (1, 2, 3) if s % every == 0 or (every > 1 and s == 1)]
    assert list(rises(trainer)) == expected


def test_both_losses_have_the_same_dropout(tmp_path):
    trainer = trainer_of(tmp_path, dropped(0.5), FlatLoRACallback(sigma=0.0))
    trainer.train()
    assert rises(trainer) == dict.fromkeys(range(1, 7), 0)


@pytest.mark.parametrize("mode", MODES)
def test_measuring_leaves_the_model_as_it_was(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    replace_linear(model, "all-linear", r=2)
    noise = flatkern.WeightNoise(model, SIGMA, mode=mode)
    x = torch.randn(16, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()

    def loss():
        assert not torch.is_grad_enabled()
        return model(x).square().mean()

    with noise.window():
        rise = loss_rise(noise, model, loss)
        assert torch.equal(torch.get_rng_state(), generator)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        noisy = model(x).square().mean().item()
    torch.set_rng_state(generator)
    clean = model(x).square().mean().item()
    assert rise.item() == pytest.approx(noisy - clean, abs=1e-6)
    assert rise.item() != 0
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_a_loss_of_its_own_is_not_measured(tmp_path):
    # The label smoother takes the labels away.
    flat = FlatLoRACallback(sigma=SIGMA)
    trainer = trainer_of(tmp_path, adapted(), flat, label_smoothing_factor=0.1)
    trainer.train()
    assert not rises(trainer)
    assert trainer.state.log_history[0]["noise_sigma"] == 0
