"""What docs and examples show runs as it stands there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as checkpoint_states
from torch.distributed.tensor import parallel as tensor_parallel

import flatkern

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import peft
from tiny import llama, tokens
from transformers import BertConfig, BertForSequenceClassification

from flatkern.integrations import peft as flatkern_peft

ROOT = Path(__file__).parents[2]
MAX_LINES = 60


def blocks_of(page):
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert found
    return [compile(block, f"{page}.md", "exec") for block in found]


def run_page(page, folder, monkeypatch):
    """What a page's blocks of Python leave behind, run one after the other."""
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks_of(page):
        exec(block, names)
    return names


def test_every_block_is_run():
    # graphs: tests/noise/test_window_compile.py and tests/test_gpu.py.
    run_here = {"accelerate", "adapters", "distributed", "lightning", "peft", "quantized"}
    run_here |= {"graphs", "layers", "methods", "quickstart", "trainer"}
    run_here |= {"landscape"}  # test_landscape_docs.py
    pages = {path.stem for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text()}
    assert pages == run_here


def test_the_quickstart(tmp_path, monkeypatch):
    names = run_page("quickstart", tmp_path, monkeypatch)
    assert names["noise"].step == names["steps"] + 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_page_on_methods(tmp_path, monkeypatch):
    names = run_page("methods", tmp_path, monkeypatch)
    assert isinstance(names["loss"], float)


def test_the_page_on_layers(tmp_path, monkeypatch):
    names = run_page("layers", tmp_path, monkeypatch)
    assert len(names["noise"].names) == 4
    experts = [p for n, p in names["model"].named_parameters() if "lora_" in n and "gate_up" in n]
    assert experts
    assert any(p.grad.any() for p in experts)


def test_the_page_on_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds, head = blocks_of("adapters")
    model = llama(hidden_size=64, intermediate_size=64)
    exec(kinds, vars(flatkern.nn) | {"model": model, "calibration_batches": [tokens()]})
    assert model(**tokens()).loss.isfinite()
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    exec(head, vars(flatkern.nn) | {"model": BertForSequenceClassification(config)})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_page_on_many_ranks(tmp_path):
    own_fsdp, own_tp, peft_fsdp, peft_tp, saved = blocks_of("distributed")
    names = {"folder": tmp_path, "flatkern": flatkern, "replace_linear": flatkern.nn.replace_linear}
    for module in (distributed.fsdp, tensor_parallel, checkpoint_states, peft, flatkern_peft):
        names |= vars(module)
    names["checkpoint"] = checkpoint
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        names["mesh"] = distributed.init_device_mesh("cpu", (1,))
        names["model"] = llama().model
        exec(own_fsdp, names)
        with names["noise"].window():
            names["model"](tokens()["input_ids"]).last_hidden_state.sum().backward()
        exec(saved, names)
        names["model"] = llama().model
        exec(own_tp, names)
        config = peft.LoraConfig(target_modules=["up_proj", "down_proj"])
        names |= {"base": llama(), "config": config}
        exec(peft_fsdp, names)
        assert len(names["noise"].names) == 4
        model = peft.get_peft_model(llama(), config)
        names["block"] = model.get_base_model().model.layers[0]
        exec(peft_tp, names)
    finally:
        distributed.destroy_process_group()


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
