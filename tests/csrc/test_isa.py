"""The CPU kernels of all instruction sets against one another, without torch."""

import shutil
import subprocess

import pytest
from compiling import CPP, CPU, CPU_FLAGS, compile_all, folder_of, link


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["test_isa", "test_residual"])
def test_every_instruction_set_gives_the_same_bits(name, tmp_path_factory):
    folder = folder_of(tmp_path_factory)
    objects = compile_all([CPP / f"{name}.cpp", *CPU.glob("isa_*.cpp")], CPU_FLAGS, folder)
    program = link(objects, folder / name)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
