"""The C++ under gcc's sanitizers: `python -m bench.reliability.sanitize`, or `make sanitize`.

The tests of tests/csrc run with more flags: the CPU kernels of every instruction set and the
decoder of residuals under AddressSanitizer with UndefinedBehaviorSanitizer, and on threads under
ThreadSanitizer; the emulated CUDA kernels under all of UndefinedBehaviorSanitizer. Then the library
is built with the first two and torch runs the tests of the CPU kernels on it. (Under
ThreadSanitizer torch's own thread pool, which is not instrumented, would look like races.)

Prints what became of each part; ends with 1 if one failed. Nothing is kept but build/sanitize.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEMORY = "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# By part: the test, and what tests/csrc/compiling.py adds to its flags. Damaged residuals are of 30
# kinds for each instruction set.
PROGRAMS = {
    "memory": ("tests/csrc/test_isa.py", f"{MEMORY} -DFLATKERN_TEST_DAMAGED=2000"),
    "races": ("tests/csrc/test_isa.py", "-g -fsanitize=thread -DFLATKERN_TEST_THREADS=4"),
    "cuda": (
        "tests/csrc/test_cuda_emulated.py",
        "-fsanitize=null,object-size,pointer-overflow -fno-sanitize-recover=all",
    ),
}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x"]
TESTS = ("tests/ops", "tests/reliability/test_fuzz.py", "tests/reliability/test_golden.py")
# Not the memory that a process takes: a sanitizer's own is many times as much.
CHOSEN = "cpu and not memory and not the_process_grows and not compiled"


def run(name: str, command: list[str], folder: Path = ROOT, **environment: str) -> bool:
    """Run one part and say what became of it."""
    begin = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    said = next((line for line in reversed(lines) if line.strip()), "")
    minutes = (time.monotonic() - begin) / 60
    if done.returncode != 0:
        print(done.stdout[-8000:])
    outcome = "ok" if done.returncode == 0 else "FAILED"
    print(f"{outcome:>6}  {minutes:4.1f} min  {name}: {said.strip()}", flush=True)
    return done.returncode == 0


def library() -> bool:
    """The tests of the CPU kernels on a library that was built with sanitizers."""
    copy = ROOT / "build" / "sanitize"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("flatkern", "csrc", "tests", "bench", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            left_out = shutil.ignore_patterns("*.so", "__pycache__", "results")
            shutil.copytree(source, copy / name, ignore=left_out)
        else:
            shutil.copy(source, copy / name)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    sanitized = {"CFLAGS": MEMORY, "LDFLAGS": MEMORY, "FLATKERN_CUDA": "0"}
    if not run("library, built", build, copy, **sanitized):
        return False
    # Exceptions are torch's to throw: its C++ library has to be there when the sanitizer starts.
    preloaded = [_library("libasan.so"), _library("libstdc++.so.6")]
    tests = [*PYTEST, "-k", CHOSEN, *TESTS]
    return run(
        "library, tests",
        tests,
        copy,
        LD_PRELOAD=":".join(preloaded),
        # Python keeps memory until it ends, and torch's own libraries are not built for this.
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0",
        PYTHONPATH=str(copy),
        FLATKERN_TEST_REQUIRE="cpu",
        OMP_NUM_THREADS="2",
    )


def _library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=(*PROGRAMS, "library"), help="one part alone")
    options = parser.parse_args()
    if shutil.which("g++") is None:
        print("sanitize: error: needs g++", file=sys.stderr)
        return 2
    passed = []
    for name, (test, flags) in PROGRAMS.items():
        if options.only in (None, name):
            passed.append(run(name, [*PYTEST, test], FLATKERN_TEST_FLAGS=flags))
    if options.only in (None, "library"):
        passed.append(library())
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
