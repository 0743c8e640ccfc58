"""Tiny random models under PEFT, and data for them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def llama(dtype=torch.float32, seed=0, hidden_size=32, intermediate_size=48, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(config=None, dtype=torch.float32, spread=True, **options):
    """A tiny Llama with LoRA on q_proj and v_proj whose B is not zero."""
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(dtype, **options), config)
    if spread:
        fill(model)
    return model


def fill(model, seed=1):
    """Adapters off their starts: B is 0 at first, and E of AdaLoRA."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "lora_E" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def tokens(rows=4, length=8, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def bits(model, keep=lambda name: True):
    """Copies of the parameters by name."""
    return {k: v.detach().clone() for k, v in model.named_parameters() if keep(k)}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
