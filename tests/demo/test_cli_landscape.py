"""`flatkern landscape` as a new user would type it, on tiny local models."""

import json

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flatkern import cli, landscape

WORDS = ["[PAD]", "[UNK]", "a", "fine", "film", "dull", "long", "play", "of", "the", "night"]
SMALL = ["--points", "3", "--draws", "1", "--quiet"]


def save(model, folder):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model with two adapters."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    save(model, folder / "base")
    for name in ("one", "two"):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / name)
    (folder / "texts.txt").write_text("a fine film\n\na dull play of the night\n")
    return folder


def test_adapters_on_the_same_directions(llama, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["landscape", str(llama / "base"), "--data", str(llama / "texts.txt")]
    for name in ("one", "two"):
        arguments += ["--adapter", str(llama / name)]
    assert cli.main([*arguments, *SMALL, "--out", str(out), "--hessian", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in figures] == ["one", "two"]
    assert figures[0]["loss"] != figures[1]["loss"]
    assert all(one["low"] <= one["average"] <= one["high"] for one in figures)
    for name in ("landscape.json", "surface.png", "surface.html", "radius.png"):
        assert (out / name).stat().st_size
    surfaces = [landscape.Surface.load(out / f"surface-{name}.json") for name in ("one", "two")]
    for surface, one in zip(surfaces, figures, strict=True):
        assert surface.loss[1, 1] == one["loss"]
    # The loss is the mean over tokens, whatever the batches.
    alone = [*arguments, *SMALL, "--out", str(tmp_path / "alone"), "--batch-size", "1", "--json"]
    assert cli.main(alone) == 0
    again = json.loads(capsys.readouterr().out)
    assert again[0]["loss"] == pytest.approx(figures[0]["loss"], rel=1e-5)


def test_a_classifier_without_adapters(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    save(BertForSequenceClassification(config), tmp_path / "bert")
    data = tmp_path / "test.csv"
    data.write_text('text,label\na fine film,1\n"a dull, long film",0\n')
    arguments = ["landscape", str(tmp_path / "bert"), "--task", "classification"]
    arguments += ["--data", str(data), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "base" in shown
    assert "average rise" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "MODEL must be the folder of a Hugging Face model"),
        ({"--adapter": "nowhere"}, "--adapter must be the folder of a PEFT adapter"),
        ({"--data": "nowhere.txt"}, "--data must be a .txt, .csv or .jsonl file"),
        ({"--data": "empty.txt"}, "at least one text"),
        ({"--data": "odd.bin"}, "got odd.bin"),
        ({"--data": "short.txt"}, "at least two tokens"),
        (
            {"--data": "bare.csv", "--task": "classification"},
            "text and label (a whole number), got text",
        ),
        ({"--out": "texts.txt"}, "--out must be a folder that can be written"),
        ({"--seed": "-1"}, "seed must be"),
    ],
)
def test_what_does_not_do_is_said_in_one_line(changes, message, llama, monkeypatch, capsys):
    monkeypatch.chdir(llama)
    for name, text in (("empty.txt", "\n"), ("odd.bin", "x"), ("short.txt", "a\n")):
        (llama / name).write_text(text)
    (llama / "bare.csv").write_text("text\na fine film\n")
    options = {"model": "base", "--data": "texts.txt", "--out": "out"} | changes
    model = options.pop("model")
    given = [part for pair in options.items() for part in pair]
    assert cli.main(["landscape", model, *given, *SMALL]) == 2
    error = capsys.readouterr().err
    assert message in error


def test_ctrl_c_keeps_the_points_so_far(llama, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(landscape, "surface_2d", interrupted)
    arguments = ["landscape", str(llama / "base"), "--data", str(llama / "texts.txt")]
    assert cli.main([*arguments, *SMALL, "--out", str(tmp_path)]) == 130
    assert "goes on from there" in capsys.readouterr().err
