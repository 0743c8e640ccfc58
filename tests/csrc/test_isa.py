"""The CPU kernels of all instruction sets against one another, without torch."""

import shutil
import subprocess

import pytest
from test_cuda_emulated import CPU_FLAGS, ROOT, compile_object, objects_folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["test_isa", "test_residual"])
def test_every_instruction_set_gives_the_same_bits(name, tmp_path_factory):
    folder = objects_folder(tmp_path_factory)
    sources = [ROOT / f"tests/cpp/{name}.cpp", *(ROOT / "csrc/cpu").glob("isa_*.cpp")]
    objects = [compile_object(source, folder, CPU_FLAGS) for source in sources]
    program = folder / name
    subprocess.run(["g++", *objects, "-pthread", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
