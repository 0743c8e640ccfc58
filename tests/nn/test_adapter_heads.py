"""Heads and other modules that are trained whole: left out of "all-linear", saved, loaded."""

import copy
import json
import warnings

import pytest
import tolerances
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import flatkern
from flatkern.nn import load_adapter, replace_linear, save_adapter

BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    num_labels=3,
)
ANSWERS = BertConfig(**BERT.to_dict() | {"num_labels": 2})
SIZES = {"vocab_size": 64, "num_labels": 3, "pad_token_id": 0}
ROBERTA = RobertaConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, **SIZES
)
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, **SIZES
)
DISTIL = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, **SIZES)
BART = BartConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    eos_token_id=7,
    **SIZES,
)
VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=8,
    patch_size=4,
    num_labels=3,
)
MODELS = {
    "bert": (BertForSequenceClassification, BERT, ["classifier"]),
    "bert tokens": (BertForTokenClassification, BERT, ["classifier"]),
    "bert answers": (BertForQuestionAnswering, ANSWERS, ["qa_outputs"]),
    "roberta": (RobertaForSequenceClassification, ROBERTA, ["classifier"]),
    "llama": (LlamaForSequenceClassification, LLAMA, ["score"]),
    "distilbert": (DistilBertForSequenceClassification, DISTIL, ["pre_classifier", "classifier"]),
    "bart": (BartForSequenceClassification, BART, ["classification_head"]),
    "vit": (ViTForImageClassification, VIT, ["classifier"]),
}
EVERY_MODEL = pytest.mark.parametrize(
    ("kind", "config", "heads"), MODELS.values(), ids=MODELS.keys()
)


def make(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(config).eval()


def inputs(config):
    if config is VIT:
        return {"pixel_values": torch.ones(2, 3, 8, 8)}
    return {"input_ids": torch.arange(8)[None]}


def logits(model, config):
    output = model(**inputs(config))
    return output.start_logits if hasattr(output, "start_logits") else output.logits


def shake(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))


def with_body_of(fresh, model, heads):
    """A new model, another head, over the same pretrained weights."""
    body = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in heads}
    fresh.load_state_dict(body, strict=False)
    return fresh


@EVERY_MODEL
def test_all_linear_trains_and_saves_the_head(kind, config, heads, tmp_path):
    model = make(kind, config)
    body = copy.deepcopy(model)
    names = replace_linear(model, "all-linear", r=4)
    assert names
    assert not any(name.split(".")[0] in heads for name in names)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trainable == {
        f"{head}.{name}"
        for head in heads
        for name, _ in model.get_submodule(head).named_parameters()
    }
    shake(model)
    # Also where somebody froze everything before saving.
    model.requires_grad_(False)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == heads
    fresh = with_body_of(make(kind, config, 1), body, heads)
    assert not torch.allclose(logits(fresh, config), logits(model, config), atol=1e-3)
    theirs = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path).eval()
    assert load_adapter(fresh, tmp_path) == names
    tolerances.assert_same_bits(logits(fresh, config), logits(model, config))
    tolerances.assert_same_bits(logits(theirs, config), logits(model, config))
    again = {n for n, p in fresh.named_parameters() if p.requires_grad and "lora_" not in n}
    assert again == trainable


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_what_peft_saves_with_a_head(name, tmp_path):
    kind, config, heads = MODELS[name]
    body = make(kind, config)
    theirs = get_peft_model(
        copy.deepcopy(body),
        LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear", r=4),
    ).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    fresh = with_body_of(make(kind, config, 1), body, heads)
    names = load_adapter(fresh, tmp_path)
    assert not any(name.split(".")[0] in heads for name in names)
    tolerances.assert_same_bits(logits(fresh, config), logits(theirs, config))
    # What was loaded is saved again, and loads into layers that are there.
    save_adapter(fresh, tmp_path / "again")
    shake(fresh)
    load_adapter(fresh, tmp_path / "again")
    tolerances.assert_same_bits(logits(fresh, config), logits(theirs, config))


def test_the_output_embedding_stays_frozen():
    model = make(BertForMaskedLM, BERT)
    names = replace_linear(model, "all-linear")
    assert "cls.predictions.transform.dense" in names
    assert "cls.predictions.decoder" not in names
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_heads_of_other_models():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(4, 4)
            self.classifier = nn.Linear(4, 2)

    plain = Custom()
    assert replace_linear(plain, "all-linear") == ["fc1", "classifier"]

    class Timm(Custom):
        def get_classifier(self):
            return self.classifier

    model = nn.ModuleDict({"tower": Timm()})
    assert replace_linear(model, "all-linear") == ["tower.fc1"]
    assert model["tower"].classifier.weight.requires_grad


def test_gpt2_has_conv1d_alone():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, **SIZES)
    with pytest.raises(ValueError, match="outside the output layers"):
        replace_linear(make(GPT2ForSequenceClassification, config), "all-linear")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        self.last = nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.last(self.body(self.norm(torch.tanh(self.fc(x))))) + self.shift


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_modules_to_save_by_name(x, tmp_path):
    model = Net()
    names = replace_linear(model, ["fc", "last"], modules_to_save=["norm", "last"])
    assert names == ["fc"]
    assert model.last.weight.requires_grad
    assert not model.body[0].weight.requires_grad
    shake(model)
    model(x)  # Statistics of the norm.
    model.eval()
    save_adapter(model, tmp_path)
    other = Net().eval()
    assert load_adapter(other, tmp_path) == ["fc"]
    tolerances.assert_same_bits(other(x), model(x))
    theirs = PeftModel.from_pretrained(Net(), tmp_path).eval()
    tolerances.assert_same_bits(theirs(x), model(x))


def test_a_head_that_is_unfrozen_later_is_saved(x, tmp_path):
    model = Net()
    replace_linear(model, ["fc"])
    model.last.weight.requires_grad_(True)
    shake(model)
    save_adapter(model.eval(), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.last.{name}" for name in ("weight", "bias")} < saved.keys()
    other = Net().eval()
    load_adapter(other, tmp_path)
    tolerances.assert_same_bits(other(x), model(x))


def test_what_cannot_be_saved_is_named(tmp_path):
    model = Net()
    replace_linear(model, ["fc"])
    model.shift.requires_grad_(True)
    model.fc.bias.requires_grad_(True)
    model.last.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"trainable but not saved: shift, fc\.bias;"):
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"not saved: shift, fc\.bias, last\.weight, last\.bias;"):
        save_adapter(model, tmp_path, modules_to_save=["norm"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]


def test_nothing_is_said_where_adapters_alone_are_trained(tmp_path):
    model = Net()
    replace_linear(model, ["fc"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["lst"], ValueError, "modules_to_save must be names of modules of the model, got 'lst'"),
        ("last", TypeError, "modules_to_save"),
        ([3], TypeError, "modules_to_save"),
        (["fc"], ValueError, "without LoRALinear layers, got fc"),
    ],
    ids=str,
)
def test_wrong_names(names, error, text, tmp_path):
    model = Net()
    replace_linear(model, ["fc"])
    with pytest.raises(error, match=text):
        save_adapter(model, tmp_path / "new", modules_to_save=names)
    assert not (tmp_path / "new").exists()
    if names != ["fc"]:
        plain = Net()
        with pytest.raises(error, match=text):
            replace_linear(plain, ["fc"], modules_to_save=names)
        assert type(plain.fc) is nn.Linear


@pytest.mark.parametrize("adapted", [False, True])
def test_a_file_whose_head_does_not_fit_changes_nothing(adapted, tmp_path):
    model = Net()
    replace_linear(model, ["fc"], modules_to_save=["last"])
    save_adapter(model, tmp_path)

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(5, 4)

    target = Other()
    if adapted:
        replace_linear(target, ["fc"])
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"last\.weight must be \[4, 5\]"):
        load_adapter(target, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_a_head_under_noise_is_saved_clean_and_not_loaded(mode, x, tmp_path):
    model = Net()
    replace_linear(model, ["fc"], modules_to_save=["last"])
    save_adapter(model, tmp_path / "clean")
    noise = flatkern.WeightNoise(model, 0.5, scope="trainable", mode=mode, strategy="gaussian")
    with noise.window():
        save_adapter(model, tmp_path / "window")
        with pytest.raises(RuntimeError, match="noise"):
            load_adapter(model, tmp_path / "clean")
    file = "adapter_model.safetensors"
    assert (tmp_path / "window" / file).read_bytes() == (tmp_path / "clean" / file).read_bytes()
