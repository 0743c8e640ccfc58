"""A tiny Llama over quantised bases under PEFT and Trainer with FlatLoRACallback, on CPU."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from quantized_bases import FORMATS, quantize, storages
from tiny import VOCABULARY, llama
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from flatkern.integrations.peft import attach
from flatkern.integrations.transformers import FlatLoRACallback

STEPS = 6


def wide_llama():
    """Widths that every format takes."""
    return llama(hidden_size=64, intermediate_size=128, layers=1)


def quantized_llama(form):
    model = wide_llama()
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    torch.manual_seed(1)
    return get_peft_model(
        quantize(model, form, names), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )


def sequences():
    """Counting up from anywhere: learnt in a few steps."""
    starts = torch.arange(24)[:, None]
    ids = (starts + torch.arange(8)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


class Losses(TrainerCallback):
    def __init__(self):
        self.train, self.evaluation = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.train.append(logs["loss"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluation.append(metrics["eval_loss"])


def trained(folder, form, resume=None, **options):
    model, losses = quantized_llama(form), Losses()
    data = sequences()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 6 micro-batches: groups of 4 and 2
        max_steps=STEPS,
        learning_rate=5e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=4,
        **{"save_strategy": "no"} | options,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[losses]
    )
    FlatLoRACallback(sigma=0.1, seed=5, schedule="constant").add_to(trainer)
    before = storages(model)
    trainer.train(resume_from_checkpoint=resume)
    after = storages(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return model, losses


def torchao_config(transformers):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def bnb_config(transformers):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("config", [torchao_config, bnb_config])
def test_a_model_that_transformers_quantised(tmp_path, config):
    wide_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=config(transformers), dtype=torch.bfloat16
    )
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    # bitsandbytes puts it on a GPU where there is one.
    before, ids = storages(model), torch.arange(8, device=model.device)[None]
    noise = attach(model, sigma=0.3)
    assert len(noise.names) == 7
    model.train()
    clean = model(input_ids=ids, labels=ids).loss
    with noise.window():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert not torch.equal(loss, clean)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = storages(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def adapters(model):
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "bnb-nf4"])
def test_training_lowers_the_loss_and_leaves_the_base(tmp_path, form):
    model, losses = trained(tmp_path, form, eval_strategy="steps", eval_steps=3)
    assert losses.train[-1] < losses.train[0] - 0.2
    assert losses.evaluation[-1] < losses.evaluation[0]
    assert not any("_flatkern_site" in module.__dict__ for module in model.modules())


def test_a_resumed_run_has_the_same_bits(tmp_path):
    form = "bnb-nf4-nested"
    saving = {"save_strategy": "steps", "save_steps": STEPS - 1}
    whole = adapters(trained(tmp_path / "whole", form, **saving)[0])
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS - 1}"
    rest = adapters(trained(tmp_path / "rest", form, resume=str(checkpoint))[0])
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
