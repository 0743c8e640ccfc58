"""The C++ under gcc's sanitizers: `python -m bench.reliability.sanitize`, or `make sanitize`.

The kernels of every instruction set and the decoder of residuals run as programs without torch,
under AddressSanitizer with UndefinedBehaviorSanitizer, and in threads under ThreadSanitizer. Then
the library is built with the first two and torch runs the tests of the CPU kernels on it. (Under
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
FOLDER = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wno-maybe-uninitialized", "-pthread"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
RACES = ["-fsanitize=thread", "-DFLATKERN_TEST_THREADS=4"]
PROGRAMS = ("test_isa", "test_residual")
TESTS = ("tests/ops", "tests/reliability/test_fuzz.py", "tests/reliability/test_golden.py")
# Not the memory that a process takes: a sanitizer's own is many times as much.
CHOSEN = "cpu and not memory and not the_process_grows and not compiled"


def run(name: str, *command: str | Path, **environment: str) -> bool:
    """Run one part and say what became of it."""
    begin = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
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


def program(name: str, kind: str, flags: list[str], *arguments: str) -> bool:
    """Build and run tests/cpp/NAME.cpp with the kernels of all instruction sets."""
    sources = [ROOT / f"tests/cpp/{name}.cpp", *sorted((ROOT / "csrc/cpu").glob("isa_*.cpp"))]
    built = FOLDER / f"{name}-{kind}"
    # The portable kernels fuse where the target can, as the others do.
    fused = ["-mfma"] if " fma " in Path("/proc/cpuinfo").read_text() else []
    command = [CXX, *FLAGS, *fused, *flags, *sources, "-o", built]
    return run(f"{name}, built, {kind}", *command) and run(f"{name}, {kind}", built, *arguments)


def library() -> bool:
    """The tests of the CPU kernels on a library that was built with sanitizers."""
    copy = FOLDER / "library"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("flatkern", "csrc", "tests", "bench", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            left_out = shutil.ignore_patterns("*.so", "__pycache__", "results")
            shutil.copytree(source, copy / name, ignore=left_out)
        else:
            shutil.copy(source, copy / name)
    flags = " ".join([*MEMORY, "-O1", "-g"])
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    sanitized = {"CFLAGS": flags, "LDFLAGS": flags, "FLATKERN_CUDA": "0"}
    command = ["sh", "-c", f'cd "{copy}" && exec "$@"', "sh"]
    if not run("library, built", *command, *build, **sanitized):
        return False
    # Exceptions are torch's to throw: its C++ library has to be there when the sanitizer starts.
    preloaded = [_library("libasan.so"), _library("libstdc++.so.6")]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", CHOSEN, *TESTS]
    return run(
        "library, tests",
        *command,
        *tests,
        LD_PRELOAD=":".join(preloaded),
        # Python keeps memory until it ends, and torch's own libraries are not built for this.
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0",
        PYTHONPATH=str(copy),
        FLATKERN_TEST_REQUIRE="cpu",
        OMP_NUM_THREADS="2",
    )


def _library(name: str) -> str:
    command = [CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--damaged", type=int, default=2000, help="residuals of each of 60 kinds (default: 2000)"
    )
    parser.add_argument("--only", choices=("memory", "races", "library"), help="one part alone")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    passed = []
    for kind, flags, damaged in (("memory", MEMORY, options.damaged), ("races", RACES, 0)):
        if options.only in (None, kind):
            for name in PROGRAMS:
                arguments = [str(damaged)] if name == "test_residual" else []
                passed.append(program(name, kind, flags, *arguments))
    if options.only in (None, "library"):
        passed.append(library())
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
