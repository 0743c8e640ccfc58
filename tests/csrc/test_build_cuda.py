"""When setup.py builds the CUDA kernels, for which architectures, and that they are registered."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flatkern
from flatkern import _backend

ROOT = Path(__file__).parents[2]
OPS = ("philox_bits", "noise", "row_norm", "perturb", "perturb.out", "perturb_", "restore_")
EXTENSION = flatkern.build_info()["extension"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="an installed copy")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("flatkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A stand-in for nvcc 13.0 under CUDA_HOME, of which a test sees the answers alone."""
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n"
        "  --list-gpu-arch) printf 'compute_80\\ncompute_89\\ncompute_90\\n' ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FLATKERN_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return program


def test_auto_builds_where_nvcc_and_a_cuda_torch_are(build, nvcc):
    assert build.cuda_plan("13.2") == (nvcc, "")


def test_auto_says_why_not(build, nvcc, monkeypatch):
    assert build.cuda_plan(None) == (None, "this torch is built without CUDA")
    assert build.cuda_plan("12.8") == (None, "nvcc is of CUDA 13.0, this torch of CUDA 12.8")
    nvcc.unlink()
    chosen, why = build.cuda_plan("13.0")
    assert chosen is None
    assert "nvcc was not found" in why
    monkeypatch.setenv("FLATKERN_CUDA", "0")
    assert build.cuda_plan("13.0") == (None, "FLATKERN_CUDA=0")


def test_asking_for_what_cannot_be_built_is_an_error(build, nvcc, monkeypatch):
    monkeypatch.setenv("FLATKERN_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FLATKERN_CUDA=1 asks .* torch is built without CUDA"):
        build.cuda_plan(None)
    with pytest.raises(SystemExit, match=r"FLATKERN_CUDA=1 asks .* nvcc is of CUDA 13\.0"):
        build.cuda_plan("12.8")
    nvcc.unlink()
    with pytest.raises(SystemExit, match=r"FLATKERN_CUDA=1 asks .* nvcc was not found"):
        build.cuda_plan("13.0")
    monkeypatch.setenv("FLATKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build.cuda_plan("13.0")


def test_insisting_needs_a_compiler_and_torch_too(build, monkeypatch):
    assert build.pure_python("no C++ compiler was found") == {}
    monkeypatch.setenv("FLATKERN_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FLATKERN_CUDA=1 asks .* no C\+\+ compiler was found"):
        build.pure_python("no C++ compiler was found")


def test_an_nvcc_that_does_not_run_is_a_reason(build, nvcc):
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert build.cuda_plan("13.0") == (None, f"{nvcc} --version tells no version")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;9.0;10.0+PTX", (8, 0), True),
        ("8.0;9.0;10.0+PTX", (8, 9), True),
        ("8.0;9.0;10.0+PTX", (12, 0), True),
        ("8.0 9.0", (12, 0), False),
        ("9.0", (8, 0), False),
        ("9.0", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.6", (8, 0), False),
        ("7.5+PTX", (7, 5), False),
        ("Hopper", (9, 0), True),
    ],
)
def test_a_gpu_without_code_of_its_own_is_not_served(archs, capability, runs):
    reason = _backend._why_no_code(archs, capability)
    assert (reason is None) == runs, reason


def test_the_error_ends_a_build(tmp_path):
    environment = {**os.environ, "FLATKERN_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "flatkern: FLATKERN_CUDA=1 asks for CUDA kernels, but" in result.stderr


def test_architectures(build, nvcc, monkeypatch):
    assert build.cuda_archs(nvcc) == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0")
    assert build.cuda_archs(nvcc) == "9.0a 12.0"


@pytest.mark.skipif(not isinstance(EXTENSION, dict), reason="flatkern._C is not built")
def test_cuda_was_built_where_it_could_be(build):
    chosen, why = build.cuda_plan(torch.version.cuda)
    if chosen is None:
        pytest.skip(why)
    assert EXTENSION["cuda"], f"rebuild: {EXTENSION['why_no_cuda']}"
    assert "-fmad=false" in EXTENSION["cuda"]["flags"]
    for op in (*OPS, "perturb_merged_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flatkern_cuda::{op}", "CUDA"), op
