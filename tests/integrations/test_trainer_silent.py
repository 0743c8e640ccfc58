"""What the log says of layers whose weights are read and which are never called; lost runs."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft import LoraConfig, get_peft_model
from tiny import bits, llama, same_bits
from tiny_trainer import MODES, SIGMA, is_base, trainer_of
from torch.nn import functional as F
from transformers import TrainerCallback

import flatkern
from flatkern.integrations.peft import attach, detach
from flatkern.integrations.transformers import FlatLoRACallback

LOGGED = {"noise_sigma", "noise_loss_rise", "noise_silent_layers"}


def reading(names):
    """A Llama some of whose layers are read, as WavLM's attention reads its projections."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for block in model.get_base_model().model.layers:
        for name in names:
            layer = getattr(block.self_attn, name)
            layer.forward = lambda x, layer=layer: (
                F.linear(x, layer.weight, layer.bias)
                + sum(0 * p.sum() for n, p in layer.named_parameters() if "lora_" in n)
            )
    return model


def history(trainer):
    return [LOGGED & e.keys() for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q_proj", "v_proj"], {"noise_silent_layers"}),
        (["q_proj"], LOGGED),
        ([], {"noise_sigma", "noise_loss_rise"}),
    ],
    # No sets in ids: their order is not that of other workers.
    ids=["all silent", "one silent", "none silent"],
)
def test_the_log_says_where_no_noise_was(tmp_path, names, expected):
    model = reading(names)
    flat = FlatLoRACallback(sigma=SIGMA, schedule="constant")
    trainer = trainer_of(tmp_path, model, flat, num_train_epochs=1)
    if names:
        with pytest.warns(UserWarning, match=r"no noise reached .*q_proj.*mode=\"inplace\""):
            trainer.train()
        entries = [e for e in trainer.state.log_history if "loss" in e]
        assert all(e["noise_silent_layers"] == 2 * len(names) for e in entries)
    else:
        trainer.train()
    assert history(trainer) == [expected] * 3


def test_in_place_reaches_every_reader(tmp_path):
    model = reading(["q_proj", "v_proj"])
    flat = FlatLoRACallback(sigma=SIGMA, schedule="constant", mode="inplace")
    trainer = trainer_of(tmp_path, model, flat, num_train_epochs=1)
    trainer.train()
    assert history(trainer) == [{"noise_sigma", "noise_loss_rise"}] * 3
    assert all(e["noise_loss_rise"] != 0 for e in trainer.state.log_history if "loss" in e)


@pytest.mark.parametrize("mode", MODES)
def test_a_window_that_nobody_holds(tmp_path, mode):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = reading([])
    before = bits(model, is_base)

    def interrupted():
        # Added late, so that train() itself does not clean up.
        trainer = trainer_of(tmp_path, model, callbacks=[Stop()])
        trainer.add_callback(FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant"))
        trainer.callback_handler.callbacks.append(trainer.callback_handler.callbacks.pop(-2))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    interrupted()
    if mode == "inplace":
        flatkern.close(model)  # A Trainer moves its model, which noise in the weights forbids.
    trainer_of(tmp_path, model, FlatLoRACallback(sigma=SIGMA), max_steps=1).train()
    assert same_bits(bits(model, is_base), before)
    interrupted()
    flatkern.close(model)
    assert same_bits(bits(model, is_base), before)
    detach(model)
    noise = attach(model, SIGMA)
    with noise.window(), pytest.raises(RuntimeError, match=r"flatkern\.close\(model\)"):
        detach(model)


def test_names_are_those_of_the_unwrapped_model():
    model = torch.compile(reading([]), backend="eager")
    noise = attach(model, SIGMA)
    assert noise.names
    assert all(name.startswith("base_model.model.model.layers.") for name in noise.names)
    detach(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    base = llama()
    base.model.embed_tokens.max_norm = 1.0  # which takes no noise
    model = torch.nn.DataParallel(get_peft_model(base, config))
    with pytest.warns(UserWarning, match=r"no noise on base_model\.model\.model\.embed_tokens"):
        attach(model, SIGMA)
