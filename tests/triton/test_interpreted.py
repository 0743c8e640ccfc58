"""Runs Triton's kernels in its interpreter, in a process of its own: the switch is an import's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatkern.triton

TESTS = Path(__file__).parents[1]

# Slow where a kernel is interpreted, or about something else than what a kernel computes.
LEFT_OUT = (
    "no_temporary",
    "chosen_words",
    "threads",
    "random_coordinates",
    # Statistics of words and normals that other tests hold against the specification.
    *("standard_normal", "correlated", "come_together", "tails"),
    *("moments", "distribution", "is_uniform"),
    "compiled",
    "version_counter",
    "backward",
    "gradient",
    "overlaps",
    "constant_to_autograd",
    # numpy, which interprets, computes as PyTorch is told.
    "flush_denormal",
)
EVERY_OP = f"triton and not ({' or '.join(LEFT_OUT)})"
# Foreach loops and noisy_linear goes through scratch, both over the ops before them.
COMPOSED = (
    *("bits_of_the_loop", "norms_of_the_loop", "left_out", "bad_value"),
    *("values_and_gradients", "random_problems"),
)
OVER_OPS = "test_foreach or test_noisy_linear"
FILES = [
    "triton/test_kernels.py",
    *("ops/test_row_norm.py", "ops/test_perturb_merged.py", "ops/test_noise.py"),
    *("ops/test_perturb.py", "ops/test_perturb_tensors.py", "ops/test_perturb_plane.py"),
    *("ops/test_foreach.py", "ops/test_noisy_linear.py"),
]
CHOSEN = (
    f"test_kernels.py or ({EVERY_OP} and not ({OVER_OPS}))"
    f" or (triton and ({OVER_OPS}) and ({' or '.join(COMPOSED)}))"
)


FAULT = flatkern.triton.interpreter_fault() if importlib.util.find_spec("triton") else "no triton"


@pytest.mark.skipif(FAULT is not None, reason=str(FAULT))
def test_interpreted():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FLATKERN_TEST_REQUIRE": "triton",
        # numpy interprets, in one thread.
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FLATKERN_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", "-k", CHOSEN]
    # Infinities and NaN are meant; numpy warns of them.
    command += ["-W", "ignore::RuntimeWarning", "--durations=5"]
    command += [str(TESTS / file) for file in FILES]
    run = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout, "FLATKERN_TEST_REQUIRE lets nothing of Triton skip"
