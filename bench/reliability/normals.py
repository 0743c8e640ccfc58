"""Compiles normals.cpp with the CPU kernels, and runs it.

    python -m bench.reliability.normals --count 1.2e9 --seed 0

KS, chi-square, moments, tails and correlations of the normals, in the orders that windows make them
in; ends with 1 if a statistic is beyond five standard deviations. FLATKERN_CPU_ISA names a narrower
set of instructions.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "csrc/cpu"
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wno-maybe-uninitialized"]


def build(folder: Path, sources: list[Path] | None = None) -> Path:
    program = folder / "normals"
    if sources is None:
        sources = [CPU / "dispatch.cpp", *sorted(CPU.glob("isa_*.cpp"))]
    command = ["g++", *FLAGS, HERE / "normals.cpp", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=float, default=1.2e9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        result = subprocess.run([program, str(options.count), str(options.seed)], check=False)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
