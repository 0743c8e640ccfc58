"""Mixtures of experts, a GPT-2, ViTs and a CLIP trained with every matrix under noise."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import transformers
from peft import LoraConfig, get_peft_model
from tiny import bits, same_bits
from torch import nn

import flatkern
from flatkern.integrations.peft import attach
from flatkern.nn import replace_linear

STEPS = 3
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL_HEADS = {**SMALL, "num_attention_heads": 2}


def ids(high, *shape):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(high, shape, generator=generator)


def pixels():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def experts(family, **options):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, num_key_value_heads=1, head_dim=8, **SMALL_HEADS, **options
    )
    return getattr(transformers, f"{family}ForCausalLM")(config), text(32)


def text(vocabulary):
    tokens = ids(vocabulary, 2, 6)
    return {"input_ids": tokens, "labels": tokens}


def mixtral():
    return experts("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def qwen():
    return experts("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)


def gpt_oss():
    return experts("GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=None)


def llama4():
    config = transformers.Llama4TextConfig(
        vocab_size=32,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size_mlp=24,
        num_local_experts=4,
        attention_chunk_size=8,
        pad_token_id=0,
        **SMALL_HEADS,
    )
    return transformers.Llama4ForCausalLM(config), text(32)


def gpt2():
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    # A resumed run would need the states of torch's generators as well.
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, **dropout, **tokens)
    return transformers.GPT2LMHeadModel(config), text(32)


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL_HEADS)
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": pixels(), "labels": ids(3, 2)}


def clip():
    text_config = {"vocab_size": 32, "max_position_embeddings": 8, **SMALL_HEADS}
    vision = {"image_size": 8, "patch_size": 4, **SMALL_HEADS}
    config = transformers.CLIPConfig(
        text_config=text_config, vision_config=vision, projection_dim=8
    )
    tokens = {"input_ids": ids(32, 2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    return transformers.CLIPModel(config), tokens | {"pixel_values": pixels(), "return_loss": True}


class TorchViT(nn.Module):
    """Of torch's own modules, as CLIP's first code was: attention reads its projections."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.places = nn.Embedding(4, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values, labels):
        x = self.patches(pixel_values).flatten(2).mT + self.places(torch.arange(4))
        logits = self.head(self.encoder(x).mean(1))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


def torch_vit():
    return TorchViT(), {"pixel_values": pixels(), "labels": ids(3, 2)}


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_STACKS = ["experts.gate_up_proj", "experts.down_proj"]
# A model and its batch; what PEFT adapts; matrices that no layer multiplies by, or others hold.
MODELS = {
    "Mixtral": (mixtral, [*_ATTENTION, "embed_tokens", "lm_head"], [*_STACKS, "gate.weight"], ()),
    "Qwen3-MoE": (qwen, [*_ATTENTION, "embed_tokens", "lm_head"], [*_STACKS, "gate.weight"], ()),
    "gpt-oss": (
        gpt_oss,
        [*_ATTENTION, "embed_tokens", "lm_head"],
        [*_STACKS, "router.weight"],
        # Biases, one of each expert.
        ("gate_up_proj_bias", "down_proj_bias"),
    ),
    "Llama 4": (
        llama4,
        [*_ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
        [*_STACKS, "router.weight"],
        (),
    ),
    "GPT-2": (gpt2, ["c_attn", "c_fc", "c_proj", "wte", "wpe"], [], ()),
    "ViT": (
        vit,
        r".*(query|key|value|dense|projection|q_proj|k_proj|v_proj|o_proj|fc1|fc2|classifier)",
        [],
        ("cls_token", "position_embeddings"),
    ),
    "torch's ViT": (
        torch_vit,
        ["patches", "places", "self_attn", "linear1", "linear2", "head"],
        [],
        (),
    ),
    "CLIP": (
        clip,
        r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2|_projection|patch_embedding|token_embedding"
        r"|position_embedding)",
        [],
        (),
    ),
}


def make(name, mode):
    """The model, its batch, its noise and its optimizer."""
    build, targets, parameters, _ = MODELS[name]
    torch.manual_seed(0)
    model, batch = build()
    config = LoraConfig(r=2, target_modules=targets, target_parameters=parameters or None)
    with warnings.catch_warnings():
        # Of Conv1D's fan_in_fan_out and of tied weights.
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    schedule = flatkern.linear_ramp(STEPS)
    noise = attach(model, 0.1, mode=mode, schedule=schedule, seed=7)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, batch, noise, torch.optim.AdamW(trained, lr=1e-2)


def make_own(name, mode):
    """The same with flatkern's layers."""
    build, targets, parameters, _ = MODELS[name]
    torch.manual_seed(0)
    model, batch = build()
    linear, others = [], list(parameters)
    for name, module in model.named_modules():
        if isinstance(targets, str):
            chosen = re.fullmatch(targets, name)
        else:
            chosen = name.split(".")[-1] in targets
        if chosen and isinstance(module, nn.MultiheadAttention):
            others += [f"{name}.in_proj_weight", f"{name}.out_proj.weight"]
        elif chosen and isinstance(module, nn.Linear):
            linear.append(name)
        elif chosen and hasattr(module, "weight"):
            others.append(f"{name}.weight")
    replace_linear(model, linear, r=2, target_parameters=others)
    noise = flatkern.WeightNoise(
        model, 0.1, mode=mode, schedule=flatkern.linear_ramp(STEPS), seed=7
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, batch, noise, torch.optim.AdamW(trained, lr=1e-2)


def train(model, batch, noise, optimizer, steps):
    losses = []
    for _ in range(steps):
        with noise.window():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# Of the two that are alike but for names, one.
CASES = [(make, name) for name in MODELS]
CASES += [(make_own, name) for name in MODELS if name != "Qwen3-MoE"]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize(("make", "name"), CASES, ids=[f"{m.__name__}-{n}" for m, n in CASES])
def test_every_matrix_takes_noise_and_a_resumed_run_is_the_same(make, name, mode):
    model, batch, noise, optimizer = make(name, mode)
    others = MODELS[name][3]
    matrices = [
        parameter
        for parameter, value in model.named_parameters()
        if value.dim() > 1 and "lora_" not in parameter and not parameter.endswith(others)
    ]
    assert sorted(noise.names) == sorted(matrices)
    before = bits(model)
    losses = train(model, batch, noise, optimizer, STEPS)
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert not noise.silent
    after = bits(model)
    for parameter, value in model.named_parameters():
        if "lora_" not in parameter:
            assert torch.equal(value, before[parameter]), parameter
    assert not same_bits(after, before)
    # Stopped after the first step and continued in another process's objects.
    model, batch, noise, optimizer = make(name, mode)
    assert train(model, batch, noise, optimizer, 1) == losses[:1]
    states = [part.state_dict() for part in (model, noise, optimizer)]
    model, batch, noise, optimizer = make(name, mode)
    for part, state in zip((model, noise, optimizer), states, strict=True):
        part.load_state_dict(state)
    assert train(model, batch, noise, optimizer, STEPS - 1) == losses[1:]
    assert same_bits(bits(model), after)
