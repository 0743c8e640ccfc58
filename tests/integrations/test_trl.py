"""FlatLoRACallback and methods under TRL's SFTTrainer, which recomputes activations by default."""

import pytest

pytest.importorskip("trl", reason="trl is not installed")

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig
from tiny import adapted, bits, llama, same_bits, tokens
from tiny_trainer import PEFT_METHODS, batches_of, steps_by_hand
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flatkern.integrations.galore import galore_adamw
from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin
from flatkern.methods import GSAM, SAM

ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def vocabulary():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(i): i for i in range(62)} | {"<pad>": 62, "<eos>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def trainer_of(folder, base, kind=SFTTrainer, adapter=ADAPTER, own=None, **options):
    """own: further arguments of the trainer; options: of its SFTConfig."""
    rows = tokens(16)["input_ids"].clamp(max=61).tolist()
    # A fingerprint of its own: to compute one, some versions of datasets pickle all of pyarrow.
    examples = Dataset(InMemoryTable.from_pydict({"input_ids": rows}), fingerprint="tiny")
    arguments = SFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **{"num_train_epochs": 1, **options},
    )
    return kind(
        model=base,
        args=arguments,
        train_dataset=examples,
        processing_class=vocabulary(),
        peft_config=adapter,
        **(own or {}),
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_supervised_fine_tuning(tmp_path, mode):
    base = llama()
    before = bits(base)
    trainer = trainer_of(tmp_path, base)
    FlatLoRACallback(sigma=0.3, seed=0, mode=mode).add_to(trainer)
    trainer.train()
    assert logged(trainer, "noise_sigma") == pytest.approx([0, 0.075, 0.225])
    rises = logged(trainer, "noise_loss_rise")
    assert rises[0] == 0
    assert 0 not in rises[1:]
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in bits(trainer.model, lambda name: "lora_" not in name).items()
    }
    after = {name: value.to(before[name].dtype) for name, value in after.items()}
    assert same_bits(after, before)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class MethodTrainer(MethodTrainerMixin, SFTTrainer):
    """What users write."""


def test_sam_s_two_passes(tmp_path):
    passes = []

    class Counting(SAM):
        def add_gradient(self, *args, **kwargs):
            passes.append(trainer.state.global_step)
            return super().add_gradient(*args, **kwargs)

    trainer = trainer_of(tmp_path, llama(), MethodTrainer, own={"method": Counting})
    before = bits(trainer.model)
    trainer.train()
    assert passes == [0] * 6 + [1] * 6 + [2] * 4
    changed = {k for k, v in bits(trainer.model).items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "lora_" in k}


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_training_is_the_method_s_own(tmp_path, name):
    """Under TRL's recomputed activations, as by hand without them."""
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
    options |= {"learning_rate": 0.1, "max_grad_norm": 1.0}
    own = {"method": PEFT_METHODS[name]}
    trainer = trainer_of(tmp_path, llama(layers=1), MethodTrainer, own=own, **options)
    model, order = trainer.model, batches_of(trainer)
    # Not a copy, whose forward TRL has bound to the model itself.
    twin, before = adapted(ADAPTER, spread=False, layers=1), bits(model)
    twin.load_state_dict(model.state_dict())
    trainer.train()
    trained = [p for p in twin.parameters() if p.requires_grad]
    by_hand = PEFT_METHODS[name](twin.train(), torch.optim.SGD(trained, lr=0.1), max_grad_norm=1.0)
    # One more micro-batch is read ahead.
    steps_by_hand(by_hand, twin, trainer, order, (3,))
    after, expected = bits(model), bits(twin)
    for key, value in after.items():
        if "lora_" in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, before[key])
    assert not same_bits(after, before)


def test_galore_as_its_optimizer(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    model, twin = llama(layers=1), llama(layers=1)
    optimizers = [galore_adamw(each, lr=1e-2, rank=4) for each in (model, twin)]
    own = {"method": GSAM, "optimizers": (optimizers[0], None)}
    options = {"max_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, model, MethodTrainer, None, own, **options)
    order = batches_of(trainer)
    trainer.train()
    by_hand = GSAM(twin.train(), optimizers[1])
    steps_by_hand(by_hand, twin, trainer, order, (3, 3))
    moved = 0.0
    for found, expected, start in zip(
        *(m.parameters() for m in (model, twin, llama(layers=1))), strict=True
    ):
        # Adam divides by moments whose smallest elements are of rounding alone.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        moved = max(moved, (found - start).abs().max().item())
    assert moved > 1e-3
