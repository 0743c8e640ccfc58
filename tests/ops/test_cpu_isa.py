"""The CPU kernels are compiled for several instruction sets, of which one process uses one.

The widest runs in every other test; here the arithmetic is tested once more on the narrower ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatkern

ROOT = Path(__file__).parents[2]
# csrc/test_isa.py holds the instruction sets against one another, these against the specification.
ARITHMETIC = (
    *("random_coordinates", "box_muller", "chosen_words", "every_code", "every_size"),
    *("special_values", "during_the_cast", "flush_denormal", "with_adapters", "square"),
    *("not_finite", "row_norm_then_perturb", "what_the_reference_writes", "noise_of_every_size"),
)
FILES = ("test_noise.py", "test_row_norm.py", "test_perturb.py", "test_perturb_merged.py")
FILES += ("test_residual.py", "test_residual_codes.py")


def in_use():
    extension = flatkern.build_info()["extension"]
    return extension["cpu"] if isinstance(extension, dict) else None


def test_the_named_instruction_set_is_in_use():
    named = os.environ.get("FLATKERN_CPU_ISA")
    if named is None or "cpu" not in flatkern.available_backends("cpu"):
        pytest.skip("the environment names none")
    assert in_use() == named


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_arithmetic_of_narrower_instruction_sets(isa):
    if "cpu" not in flatkern.available_backends("cpu"):
        pytest.skip("no CPU kernels here")
    if os.environ.get("FLATKERN_CPU_ISA") or in_use() in (isa, "portable"):
        pytest.skip(f"{in_use()} is what the other tests run on")
    environment = {**os.environ, "FLATKERN_CPU_ISA": isa, "FLATKERN_TEST_REQUIRE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest"]
    command += ["-x", "-q", __file__]
    command += [str(Path(__file__).parent / name) for name in FILES]
    command += ["-k", f"(cpu and ({' or '.join(ARITHMETIC)})) or instruction_set_is_in_use"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
