"""Compiles and runs the test of csrc/philox.h and csrc/numeric.h on the host."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "csrc"


def test_shared_headers(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not CSRC.is_dir():
        pytest.skip("an installed copy has no csrc")
    program = tmp_path / "test_headers"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    source = TESTS / "cpp" / "test_headers.cpp"
    build = subprocess.run(
        [compiler, *flags, f"-I{CSRC}", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run(
        [str(program), str(TESTS / "data" / "philox_kat.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
