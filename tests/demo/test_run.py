"""The whole demo on a tiny random model and made-up sentences."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extras are not installed")
pytest.importorskip("matplotlib", reason="the demo's extras are not installed")
pytest.importorskip("tabulate", reason="the demo's extras are not installed")
pytest.importorskip("tqdm", reason="the demo's extras are not installed")

import transformers

from flatkern import cli
from flatkern.demo import certain, data, experiment, model, report, run, settings
from flatkern.demo.settings import METHODS, Recipe, Setting

TINY = Setting("tiny", 0.25, epochs=1, quick_epochs=1, lr=1e-3, sigma=0.5, dropout=0.5)
FEATURES = 32


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=FEATURES,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return transformers.BertModel(config).eval()


def tokenize(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
    """One token per letter."""
    rows = [torch.tensor([ord(letter) % 50 for letter in text]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def sentences(count: int) -> data.Sentences:
    texts = ["good" if number % 2 else "rather bad" for number in range(count)]
    return data.Sentences(texts, np.arange(count) % 2)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Matrices this small are slower with threads that wait for each other."""
    threads(1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = {name: sentences(200) for name in data.FILES}
    monkeypatch.setattr(data, "load_sentences", lambda: domains)
    monkeypatch.setattr(model, "load_pretrained", lambda: (tiny_model(), tokenize))
    monkeypatch.setattr(cli, "_missing_for_demo", lambda: None)
    monkeypatch.setattr(run, "SETTINGS", (TINY,))
    few = functools.partial(certain.exactness, windows=20)
    monkeypatch.setattr(certain, "exactness", few)
    monkeypatch.setattr(settings, "TRAINING_SENTENCES", 64)
    monkeypatch.setattr(settings, "VALIDATION_SENTENCES", 20)
    monkeypatch.setattr(settings, "TEST_SENTENCES", 20)
    monkeypatch.setattr(settings, "QUICK_TEST_SENTENCES", 10)


@pytest.fixture(scope="module")
def encoded() -> tuple[torch.nn.Module, model.Encoded]:
    lower, top = model.split_encoder(tiny_model())
    part = sentences(64)
    return top, model.encode(lower, tokenize, part.texts, part.labels, "test")


def run_arm(top: torch.nn.Module, part: model.Encoded, recipe: Recipe) -> experiment.Run:
    return experiment.run(
        top,
        recipe,
        part,
        {"movies": part},
        setting="tiny",
        in_domain="movies",
        epochs=1,
        seed=0,
        draws=experiment.DRAWS,
        points=experiment.CURVE_POINTS,
        on_step=lambda: None,
    )


def test_lower_and_top_layers_together_are_the_whole_model(
    encoded: tuple[torch.nn.Module, model.Encoded],
) -> None:
    top, part = encoded
    tokens = tokenize(sentences(64).texts)
    with torch.no_grad():
        hidden = tiny_model()(**tokens).last_hidden_state
        weights = tokens["attention_mask"][..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        whole = model.TopLayers(top, FEATURES).eval()
        torch.testing.assert_close(whole(part.hidden, part.mask), whole.head(mean))


def test_batches_drop_padding_and_nothing_else(
    encoded: tuple[torch.nn.Module, model.Encoded],
) -> None:
    _, part = encoded
    batches = part.batches(8)
    assert {batch[0].shape[1] for batch in batches} == {len("good"), len("rather bad")}
    assert sum(len(batch[2]) for batch in batches) == 64
    assert part.longest(4)[1].all()


ARMS = {recipe.arm: recipe for recipe in (*TINY.method_recipes(METHODS), *TINY.recipes())}


@pytest.mark.parametrize("recipe", ARMS.values(), ids=ARMS)
def test_an_arm_trains_without_touching_a_frozen_weight(
    recipe: Recipe, encoded: tuple[torch.nn.Module, model.Encoded]
) -> None:
    result = run_arm(*encoded, recipe)
    assert result.weights_changed == 0
    assert result.curve_epoch == [1]
    assert [len(draws) for draws in result.radius_loss] == [1] + [experiment.DRAWS] * 5
    assert result.radius_loss[0] == [result.curve_train_loss[-1]]


def test_a_run_is_repeated_exactly(encoded: tuple[torch.nn.Module, model.Encoded]) -> None:
    flat = TINY.recipes()[1]
    first, second = run_arm(*encoded, flat), run_arm(*encoded, flat)
    assert first.loss == second.loss
    assert first.radius_loss == second.radius_loss


def test_every_arm_of_a_seed_starts_from_the_same_numbers(
    encoded: tuple[torch.nn.Module, model.Encoded],
) -> None:
    top, _ = encoded
    models = [experiment.build(top, FEATURES, recipe, seed=7) for recipe in TINY.recipes()]
    for others in zip(*(built.parameters() for built in models), strict=True):
        assert all(torch.equal(others[0], other) for other in others)


def test_changed_bits_are_counted(encoded: tuple[torch.nn.Module, model.Encoded]) -> None:
    top, _ = encoded
    built = experiment.build(top, FEATURES, TINY.recipes()[0], seed=0)
    frozen = experiment.FrozenWeights(built)
    weight = next(weight for weight in built.parameters() if not weight.requires_grad)
    with torch.no_grad():
        weight.view(-1)[:3] = torch.tensor([-0.0, 1.0, float("nan")])
    assert frozen.changed() == 3


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_table_record_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--seeds", "2", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "Flat-LoRA against LoRA" in out
    for name in ("results.md", "results.json", "radius.png", "curves.png"):
        assert str(tmp_path / name) in out
        assert (tmp_path / name).stat().st_size > 0
    record = json.loads((tmp_path / "results.json").read_text())
    arms = [entry["recipe"]["arm"] for entry in record["runs"]]
    assert arms == ["LoRA", "Flat-LoRA", "LoRA + dropout"] * 2
    assert record["command"] == "flatkern demo --seeds 2"
    assert record["config"]["test_sentences_per_domain"] == settings.QUICK_TEST_SENTENCES == 10
    assert record["exactness"]["changed"] == 0 < record["exactness"]["published_changed"]
    # The bits and the cost come first; how far the demo is, to whom has no terminal.
    assert out.index("time x LoRA") < out.index("accuracy %")
    assert "Flat-LoRA, as published" in out
    assert re.search(r"step \d+ of 12, about .* min left: tiny, seed 1, Flat-LoRA", err)


def test_methods_are_compared(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["SAM-W", "MeZO"]
    options = ["--methods", ",".join(names), "--seeds", "1"]
    assert cli.main(["demo", *options, "--out", str(tmp_path)]) == 0
    written = (tmp_path / "results.md").read_text()
    assert "`flatkern demo --methods SAM-W,MeZO --seeds 1`" in written
    rows = [line.split("|") for line in written.splitlines() if line.startswith("| tiny")]
    arms = ["LoRA", *names]
    assert [row[2].strip() for row in rows] == arms
    record = json.loads((tmp_path / "results.json").read_text())
    assert [cost["arm"] for cost in record["costs"]] == arms
    assert all(cost["seconds"] > 0 and cost["peak_extra_bytes"] > 0 for cost in record["costs"])
    assert (tmp_path / "radius.png").stat().st_size > 1000
    assert "time x LoRA" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := cli._missing_for_demo():
        pytest.skip(missing)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "error: --out: " in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_changed_weight_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment.FrozenWeights, "changed", lambda _: 1)
    assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert "3 frozen weights do not have the bits" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_choosing_reads_no_test_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.choose, "SCAN_SEEDS", (1000, 1001))
    for name in ("LRS", "SIGMAS", "DROPOUTS"):
        monkeypatch.setattr(run.choose, name, (1e-3, 0.5))
    seen: list[str] = []
    encode = model.encode

    def spy(*arguments: object) -> model.Encoded:
        seen.append(arguments[-1])
        return encode(*arguments)

    monkeypatch.setattr(model, "encode", spy)
    assert cli.main(["demo", "--choose", "--out", str(tmp_path)]) == 0
    assert "tiny: lr " in capsys.readouterr().out
    assert len(seen) == 1 + len(run.choose.SCAN_SEEDS)
    record = json.loads((tmp_path / "choice.json").read_text())
    assert len(record["tried"]) == 6
    assert set(record["config"]["scan_seeds"]).isdisjoint(range(settings.FULL_SEEDS))


def finished(arm: str, seed: int, accuracy: float) -> experiment.Run:
    domains = dict.fromkeys(data.FILES, accuracy)
    return experiment.Run(
        "tiny",
        seed,
        Recipe(arm, 1e-3),
        accuracy=domains,
        loss=dict.fromkeys(data.FILES, 0.5),
        curve_epoch=[1, 2],
        curve_accuracy=[accuracy + 2, accuracy],
        radius_loss=[[0.5], [0.5], [0.75], [1.0], [1.0], [1.0]],
    )


def test_the_table_shows_mean_and_deviation() -> None:
    runs = [finished("LoRA", 0, 60.0), finished("LoRA", 1, 64.0)]
    lines = report.table(runs, "github").splitlines()
    assert len(lines) == 3
    assert "62.0 ± 2.8" in lines[2]
    assert "0.50 ± 0.00" in lines[2]
    assert "0.250 ± 0.000" in lines[2]


def test_the_summary_says_when_plain_lora_is_better() -> None:
    runs = [
        finished(arm, seed, accuracy + seed)
        for arm, accuracy in (("LoRA", 70.0), ("Flat-LoRA", 66.0), ("LoRA + dropout", 68.0))
        for seed in range(2)
    ]
    words = report.summary(runs)
    assert "Flat-LoRA against LoRA -4.0 points on movies (better in 0 of 2 seeds)" in words
    assert "highest mean accuracy on movies: LoRA\n" in words
    assert "at the best epoch of the test curve: LoRA 72.5 (epoch 1), Flat-LoRA 68.5" in words
    assert "says nothing of a gain elsewhere" in words
