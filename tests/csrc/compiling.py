"""The C++ sources compiled for the host, each once for all tests of all workers."""

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock  # torch needs it

ROOT = Path(__file__).parents[2]
CPP = ROOT / "tests" / "cpp"
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
# More flags for everything: bench/reliability/sanitize.py asks for sanitizers.
MORE = shlex.split(os.environ.get("FLATKERN_TEST_FLAGS", ""))
# Undefined behaviour ends a run: misaligned 128-bit accesses, shifts and indices out of range.
CUDA_FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fsanitize=undefined",
    # Guards around buffers see what these three do, which take half of the compiler's time.
    # `make sanitize` has them.
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
    "-DFLATKERN_EMULATE",
    f"-I{CPP}",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    *MORE,
]
STANDARD = ("algorithm", "cmath", "deque", "functional", "memory", "random", "string", "vector")


def _fused() -> list[str]:
    """For the portable kernels: they fuse where the target can, which x86 has to be told."""
    cpuinfo = Path("/proc/cpuinfo")
    return ["-mfma"] if cpuinfo.exists() and " fma " in cpuinfo.read_text() else []


# -O1 takes half as long as -O3.
CPU_FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-pthread",
    "-Wall",
    "-Wno-maybe-uninitialized",
    *_fused(),
    *MORE,
]


def folder_of(tmp_path_factory) -> Path:
    """One for all tests of all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


def compile_all(sources: list[Path], flags: list[str], folder: Path) -> list[Path]:
    """The objects of these sources, side by side."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda source: _compile(source, flags, folder), sources))


def compile_emulated(sources: list[Path], folder: Path) -> list[Path]:
    """compile_all of CUDA's sources and of what calls them, which all see the standard library's
    headers: those take longer to parse than the rest, and are parsed once.
    """
    header = folder / "standard.h"
    with FileLock(f"{header}.lock"):
        if not header.exists():
            header.write_text("".join(f"#include <{name}>\n" for name in STANDARD))
            command = ["g++", *CUDA_FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"]
            subprocess.run(command, check=True)
    return compile_all(sources, [*CUDA_FLAGS, "-include", str(header)], folder)


def _compile(source: Path, flags: list[str], folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            subprocess.run(["g++", *flags, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


def link(objects: list[Path], target: Path, *flags: str) -> Path:
    """A program, or a library if the flags say so."""
    subprocess.run(["g++", "-pthread", *flags, *MORE, *objects, "-o", target], check=True)
    return target
