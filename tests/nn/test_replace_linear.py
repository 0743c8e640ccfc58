"""replace_linear: what it finds, what it leaves alone, and that an error changes nothing."""

import copy

import pytest
import tolerances
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from flatkern.nn import LoRALinear, replace_linear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def tiny_llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return BertModel(config)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def snapshot(model):
    kinds = dict(model.named_modules(remove_duplicate=False))
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    return kinds, flags, copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    kinds, flags, state = before
    now = snapshot(model)
    assert now[0].keys() == kinds.keys()
    assert all(now[0][name] is module for name, module in kinds.items())
    assert now[1] == flags
    for name, value in state.items():
        tolerances.assert_same_bits(now[2][name], value)


def test_llama_by_suffix():
    model = tiny_llama().train()
    ids = torch.randint(50, (2, 7))
    expected = model(ids).logits
    names = replace_linear(model, ["q_proj", "v_proj"], r=4, lora_alpha=32)
    assert names == [
        f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")
    ]
    assert adapted(model) == names
    tolerances.assert_same_bits(model(ids).logits, expected)
    layer = model.get_submodule(names[0])
    assert (layer.r, layer.lora_alpha, layer.training) == (4, 32, True)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == [f"{name}.lora_{part}" for name in names for part in "AB"]
    model(ids).logits.square().mean().backward()
    assert layer.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_output_embedding(tied):
    model = tiny_llama(tied)
    wrapper = nn.ModuleDict({"lm": model})
    names = replace_linear(wrapper, "all-linear")
    kinds = [f"self_attn.{p}" for p in ATTENTION] + [f"mlp.{p}" for p in MLP]
    assert names == [f"lm.model.layers.{i}.{kind}" for i in range(2) for kind in kinds]
    assert type(model.lm_head) is nn.Linear
    assert not model.lm_head.weight.requires_grad


def test_an_output_embedding_that_is_named_is_replaced():
    model = tiny_llama(tied=True)
    assert replace_linear(model, ["lm_head"]) == ["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bert_all_linear():
    model = tiny_bert().eval()
    ids = torch.randint(50, (2, 7))
    expected = model(ids).last_hidden_state
    names = replace_linear(model, "All-Linear", lora_dropout=0.5)
    linear = [n for n, m in tiny_bert().named_modules() if isinstance(m, nn.Linear)]
    assert names == linear
    assert len(names) == 7
    tolerances.assert_same_bits(model(ids).last_hidden_state, expected)
    assert not any(module.training for module in model.modules())


def test_state_dict_keeps_its_names():
    model = tiny_bert()
    before = list(model.state_dict())
    replace_linear(model, ["query"])
    after = model.state_dict()
    assert [name for name in after if "lora_" not in name] == before


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["proj"], ["a.proj", "b.proj"]),
        (("a.proj",), ["a.proj"]),
        ({"b.head", "a.proj"}, ["a.proj", "b.head"]),
        (r"[ab]\.(proj|head)", ["a.proj", "a.head", "b.proj", "b.head"]),
        (r".*\.head", ["a.head", "b.head"]),
        ("all-linear", ["a.proj", "a.head", "b.proj", "b.head"]),
    ],
)
def test_matching(targets, expected):
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    assert replace_linear(model, targets) == expected
    assert adapted(model) == expected


def test_a_suffix_is_whole_words():
    model = nn.ModuleDict({"q_proj": nn.Linear(3, 3), "old_q_proj": nn.Linear(3, 3)})
    assert replace_linear(model, ["q_proj"]) == ["q_proj"]


def test_one_module_in_two_places_stays_one():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(3, 3)})
    assert replace_linear(model, "all-linear") == ["a", "b.0", "c"]
    assert isinstance(model["a"], LoRALinear)
    assert model["b"][0] is model["a"]
    assert model["c"] is not model["a"]


def test_a_second_call_adds_to_the_first():
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    replace_linear(model, ["a.proj"])
    model["a"].proj.lora_A.requires_grad_(False)
    replace_linear(model, ["b.proj"])
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == ["a.proj.lora_B", "b.proj.lora_A", "b.proj.lora_B"]


def test_dtype_is_kept():
    model = nn.Sequential(nn.Linear(3, 3)).to(torch.bfloat16)
    replace_linear(model, "all-linear")
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].lora_A.dtype == torch.float32


ERRORS = [
    (["proj", "wq", "wk"], ValueError, r"'wk', 'wq', not found; .*a\.proj, a\.head"),
    ([], ValueError, "nothing, not found"),
    (r"a\.x", ValueError, r"not found; .*a\.proj"),
    ("a(", ValueError, "regular expression"),
    (["a"], TypeError, "a must be nn.Linear, got Block"),
    (r"a(\.proj)?", TypeError, "a must be nn.Linear, got Block"),
    (["proj", "out_proj"], TypeError, r"a\.attention\.out_proj .*MultiheadAttention reads"),
    ([3], TypeError, "target_modules"),
    (None, TypeError, "target_modules"),
    (["proj", "odd"], TypeError, "odd must be nn.Linear, got Bilinear"),
]


@pytest.mark.parametrize(("targets", "error", "text"), ERRORS, ids=str)
def test_an_error_changes_nothing(targets, error, text):
    model = nn.ModuleDict({"a": Block(), "odd": nn.Bilinear(2, 2, 2)})
    before = snapshot(model)
    with pytest.raises(error, match=text):
        replace_linear(model, targets)
    assert_unchanged(model, before)


def test_a_replaced_layer_is_not_replaced_again():
    model = nn.ModuleDict({"a": Block()})
    replace_linear(model, "all-linear")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"a\.proj must be .* it has adapters already"):
        replace_linear(model, ["proj"])
    with pytest.raises(ValueError, match="not found"):
        replace_linear(model, "all-linear")
    assert_unchanged(model, before)


def test_many_unknown_layers_are_not_all_listed():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(ValueError, match="and 22 more"):
        replace_linear(model, ["x"])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_failing_to_build_a_later_layer_changes_nothing(monkeypatch, error):
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    before = snapshot(model)
    calls = []

    def fail_at_third(self, init):
        calls.append(init)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(LoRALinear, "_init_adapters", fail_at_third)
    with pytest.raises(error):
        replace_linear(model, "all-linear")
    assert_unchanged(model, before)


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError, match="model"):
        replace_linear([nn.Linear(2, 2)], "all-linear")
