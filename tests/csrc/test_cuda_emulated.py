"""The CUDA kernels' own source, compiled for the host and run thread by thread, without a GPU."""

import shutil
import subprocess

import pytest
from compiling import CPP, CPU, CPU_FLAGS, CUDA, compile_all, compile_emulated, folder_of, link

PROGRAMS = tuple(f"test_cuda{part}" for part in ("", "_plane", "_foreach", "_rows", "_launch"))

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="an installed copy has no csrc"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """One program per test, linked from the kernels' objects."""
    folder = folder_of(tmp_path_factory)
    kernels = [source for source in sorted(CUDA.glob("*.cu")) if "residual" not in source.name]
    tests = [CPP / f"{name}.cpp" for name in PROGRAMS]
    built = compile_emulated([*kernels, *tests], folder)
    shared = [*built[: len(kernels)], *compile_all([CPU / "isa_portable.cpp"], CPU_FLAGS, folder)]
    for name, test in zip(PROGRAMS, built[len(kernels) :], strict=True):
        link([test, *shared], folder / name, "-fsanitize=undefined")
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_emulated(programs, name):
    result = subprocess.run([programs / name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
