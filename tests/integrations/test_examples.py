"""What docs and examples show runs as it stands there."""

import importlib.util
import re
from pathlib import Path

import pytest

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")

ROOT = Path(__file__).parents[2]
MAX_LINES = 60


@pytest.mark.parametrize("page", ["peft", "trainer", "quantized"])
def test_the_page_s_example_runs(page, tmp_path, monkeypatch):
    if page == "quantized":
        pytest.importorskip("torchao", reason="torchao is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(blocks[0], f"{page}.md", "exec"), names)
    assert not any("_flatkern_site" in module.__dict__ for module in names["model"].modules())
    if page != "trainer":
        assert names["noise"].step == 4
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    else:
        assert names["trainer"].state.global_step == 6
        assert all("noise_sigma" in e for e in names["trainer"].state.log_history if "loss" in e)


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
    sigmas = [e["noise_sigma"] for e in trainer.state.log_history if "loss" in e]
    assert sigmas == [0, pytest.approx(0.15)]
