"""The blocks of docs/landscape.md run, one after the other."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from tiny import adapted, tokens

PAGE = Path(__file__).parents[2] / "docs" / "landscape.md"
if not PAGE.is_file():
    pytest.skip("an installed copy has no docs", allow_module_level=True)


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    peft_model = adapted()
    names = {
        "torch": torch,
        "peft_model": peft_model,
        "peft_loss": lambda: peft_model(**tokens()).loss,
        "held_out_loss": lambda model: model(**tokens()).loss,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {"surface.png", "surface.json", "both.svg", "radius.png"}
    assert names["eigenvalue"].converged
    assert names["flatness"].interval[0] <= names["flatness"] <= names["flatness"].interval[1]
    assert len(names["callbacks"]) == 2
