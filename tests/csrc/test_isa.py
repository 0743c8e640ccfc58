"""The CPU kernels of all instruction sets against one another, without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized"]


def fused():
    """For the portable kernels: they fuse where the target can, which x86 has to be told."""
    cpuinfo = Path("/proc/cpuinfo")
    return ["-mfma"] if cpuinfo.exists() and " fma " in cpuinfo.read_text() else []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    sources = [ROOT / "tests/cpp/test_isa.cpp", *(ROOT / "csrc/cpu").glob("isa_*.cpp")]
    program = tmp_path / "test_isa"
    subprocess.run(["g++", *FLAGS, *fused(), *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
