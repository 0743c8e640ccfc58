"""bench/roofline.py: what it draws of a run, without drawing."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)
pytest.importorskip("tabulate")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from bench import roofline  # noqa: E402
from bench.gpu_ops import Cell  # noqa: E402


def cell(op, provider):
    return Cell(op, roofline.ROWS, roofline.COLS, "bfloat16", provider)


def test_times_are_multiples_of_a_copy_of_the_same_bytes():
    outcomes = {
        cell(op, provider): {"seconds": seconds}
        for op in ("perturb", "row_norm")
        for provider, seconds in (("copy", 20e-6), ("cuda", 30e-6), ("eager", 80e-6))
    }
    outcomes[cell("perturb", "triton")] = {"status": "failed"}
    found, floor = roofline.multiples(outcomes, "perturb", "bfloat16")
    assert found == pytest.approx({"cuda": 1.5, "eager": 4})
    assert floor == 20e-6
    # It only reads: half of what the copy beside it moves.
    assert roofline.multiples(outcomes, "row_norm", "bfloat16")[0]["cuda"] == pytest.approx(3)


def test_instructions_are_those_of_all_kernels_of_an_op():
    def row(kernel, per_element, path=None, arch=90):
        return {"kernel": kernel, "arch": arch, "per_element": per_element, "path": path}

    kernels = [
        row("perturb_kernel<Perturb, BFloat16, BFloat16, false>", 19.5),
        row("perturb_kernel<Perturb, BFloat16, BFloat16, false>", 17.0, arch=100),
        row("perturb_residual_kernel<BFloat16, false, true>", 90.0, 49.0),
        row("restore_residual_kernel<BFloat16, false, true>", 65.0, 45.0),
    ]
    assert roofline.instructions(kernels, "perturb", "bfloat16") == 19.5
    assert roofline.instructions(kernels, "window", "bfloat16") == 94
    assert roofline.instructions(kernels, "window", "float32") is None
    assert roofline.instructions(kernels, "row_norm", "bfloat16") is None


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_committed_runs_are_read(device):
    title, outcomes = roofline.read(roofline.RESULTS / device)
    assert device.upper() in title
    assert "commit" in title
    for op in roofline.OPS:
        found, _ = roofline.multiples(outcomes, op, "float32")
        assert found["cuda"] > 1, "no op is faster than a copy"
