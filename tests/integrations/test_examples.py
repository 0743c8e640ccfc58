"""What docs and examples show runs as it stands there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")

ROOT = Path(__file__).parents[2]
MAX_LINES = 60


def run_page(page, folder, monkeypatch):
    """What a page's blocks of Python leave behind, run one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert blocks
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
    return names


def has_sites(model):
    return any("_flatkern_site" in module.__dict__ for module in model.modules())


def sigmas(trainer):
    return [entry["noise_sigma"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_page_on_peft(tmp_path, monkeypatch):
    names = run_page("peft", tmp_path, monkeypatch)
    assert not has_sites(names["model"])
    assert names["noise"].step == len(names["steps"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_page_on_trainer(tmp_path, monkeypatch):
    names = run_page("trainer", tmp_path, monkeypatch)
    assert not has_sites(names["model"])
    assert names["trainer"].state.global_step == 6
    assert len(sigmas(names["trainer"])) == 6
    assert names["sam_trainer"].state.global_step == 6


def test_the_page_on_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    names = run_page("lightning", tmp_path, monkeypatch)
    assert names["trainer"].global_step == 6
    assert names["trainer"].logged_metrics["noise_sigma"] > 0


def test_the_page_on_accelerate(tmp_path, monkeypatch):
    noise = run_page("accelerate", tmp_path, monkeypatch)["noise"]
    assert noise.step == 6
    assert not noise.active


def test_the_page_on_quantised_bases(tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    names = run_page("quantized", tmp_path, monkeypatch)
    assert not has_sites(names["model"])
    assert names["noise"].step == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def example(name):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < MAX_LINES
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_minilm_under_peft_and_trainer():
    from flatkern.demo import DemoError, model

    try:
        model.model_folder()
    except DemoError as error:
        pytest.skip(str(error))
    texts, labels = ["a fine film", "a dull film"] * 4, [1, 0] * 4
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    arguments |= {"use_cpu": True, "logging_steps": 1}
    accuracy, trainer = example("peft_trainer").train(texts, labels, texts, labels, **arguments)
    assert 0 <= accuracy <= 1
    assert sigmas(trainer) == [0, pytest.approx(0.15)]


def test_sft_on_a_tiny_model(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    options = {"max_steps": 2, "disable_tqdm": True}
    trainer = example("sft").main(str(tmp_path), save_strategy="no", **options)
    assert sigmas(trainer) == [0, pytest.approx(0.025)]


def test_lightning(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = example("lightning_module").main(
        str(tmp_path), enable_progress_bar=False, enable_model_summary=False, **options
    )
    assert trainer.global_step == 9
    assert trainer.callback_metrics["noise_sigma"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("own_accelerate")
def test_a_loop_with_accelerate(tmp_path):
    noise = example("accelerate_loop").main(str(tmp_path), cpu=True)
    assert noise.step == 9
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_plain_loop_resumes_with_the_same_bits(tmp_path):
    train = example("plain_loop").train
    whole = train(tmp_path / "whole").state_dict()
    train(tmp_path / "halves", stop=9)
    halves = train(tmp_path / "halves").state_dict()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
