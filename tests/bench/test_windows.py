"""A hundred in-place windows on each set of weights of bench.windows: no bit changes."""

from pathlib import Path

import pytest
import torch

import flatkern

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)
pytest.importorskip("tabulate", reason="bench's extras are not installed")
pytest.importorskip("tqdm", reason="bench's extras are not installed")

from bench import windows  # noqa: E402

WINDOWS = 100


def weights_of(kind, dtype):
    if kind == "MiniLM layer":
        pytest.importorskip("transformers", reason="the demo's extras are not installed")
        from flatkern.demo import DemoError

        try:
            windows.minilm_layer()
        except DemoError as error:
            pytest.skip(str(error))
    return windows.KINDS[kind](dtype)


@pytest.mark.parametrize("dtype", windows.DTYPES, ids=str)
@pytest.mark.parametrize("kind", windows.KINDS)
def test_no_bit_is_changed(kind, dtype):
    weights = weights_of(kind, dtype)
    if not flatkern.ops.residual.is_available(weights[0]):
        pytest.skip("this backend has no residual")
    with torch.no_grad():
        changed, bits, _ = windows.with_residual(weights, WINDOWS, lambda: None)
    assert changed == 0
    # Noise was there to be taken back: nothing is stored where nothing is perturbed.
    assert bits > 0.1


@pytest.mark.parametrize("dtype", windows.DTYPES, ids=str)
def test_the_published_algorithm_changes_weights(dtype):
    # So that what is counted above could be seen.
    with torch.no_grad():
        share, drift = windows.published(windows.random_weight(16).to(dtype), 5, lambda: None)
    assert share > 0.05
    assert drift > 0
