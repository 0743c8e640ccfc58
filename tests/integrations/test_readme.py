"""The README's blocks do what stands beside them, in their order, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import tolerances
import torch
from torch.nn import functional as F

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tiny import adapted, bits, llama, same_bits, tokens
from transformers import Trainer, TrainingArguments

import flatkern

ROOT = Path(__file__).parents[2]
if not (ROOT / "README.md").is_file():
    pytest.skip("an installed copy has no README", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOOP, METHOD, ONE_LINE, LANDSCAPE, EQUATION = re.findall(
    r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL
)


def run(block, names):
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_loop_and_the_method_that_is_that_loop():
    model = llama()
    before = bits(model)
    loader = [[tokens(seed=2 * step), tokens(seed=2 * step + 1)] for step in range(3)]
    names = run(LOOP, {"model": model, "loader": loader, "total_steps": len(loader)})
    assert names["noise"].step == len(loader)
    names = run(METHOD, names)
    assert isinstance(names["loss"], float)
    after = bits(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(("lora_" in name) == (name in trained) for name in after)
    assert all(after[name].any() for name in trained if "lora_B" in name)
    assert same_bits({k: v for k, v in after.items() if k not in trained}, before)


def test_one_line_in_a_trainer_and_one_in_a_loop(tmp_path):
    arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, logging_steps=1)
    data = [{k: v[0] for k, v in tokens(1, seed=i).items()} for i in range(4)]
    trainer = Trainer(adapted(), arguments, train_dataset=data)
    peft_model = adapted()
    clean = peft_model(**tokens()).loss
    names = run(ONE_LINE, {"trainer": trainer, "peft_model": peft_model})
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["noise_sigma"] for entry in logged] == [0, pytest.approx(0.025)]
    with names["noise"].window():
        assert peft_model(**tokens()).loss != clean
    assert peft_model(**tokens()).loss == clean


def test_a_landscape(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    model = llama(layers=1)
    before = bits(model)
    block = LANDSCAPE.replace("points=51", "points=3")
    names = run(block, {"model": model, "loss_fn": lambda: model(**tokens()).loss})
    assert names["flatness"].interval[0] <= names["flatness"] <= names["flatness"].interval[1]
    assert names["surface"].loss[1, 1] == model.eval()(**tokens()).loss
    assert (tmp_path / "surface.png").is_file()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_equation_is_what_the_ops_compute(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, r = 24, 40, 4
    W, B, A, x, b = (
        torch.randn(size, generator=generator) for size in ((m, n), (m, r), (r, n), (5, n), (m,))
    )
    W, x, b = W.to(dtype), x.to(dtype), b.to(dtype)
    names = {"W": W, "B": B, "A": A, "x": x, "b": b, "s": 2.0, "m": m, "n": n, "sigma": 0.05}
    names = run(EQUATION, names | {"F": F, "torch": torch, "flatkern": flatkern})
    norms = flatkern.ops.row_norm(W, A, B, 2.0)
    torch.testing.assert_close(0.05 / n**0.5 * norms, names["c"], rtol=1e-6, atol=0)
    # c is what row_norm may round otherwise; from there on every bit is the same.
    noisy = flatkern.ops.perturb(W, names["c"], names["key"])
    tolerances.assert_same_bits(noisy, names["W_noisy"])
    y = flatkern.ops.noisy_linear(x, W, b, A, B, 2.0, names["c"], names["key"])
    # Sums of 40 products in another order, some of them rounded to the dtype on the way.
    bound = 4 * tolerances.ulp(names["y"].abs().max(), dtype)
    tolerances.assert_within(y, names["y"], bound)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
