"""The CUDA kernels' own source, compiled for the host and run thread by thread, without a GPU."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it

ROOT = Path(__file__).parents[2]
CPP = ROOT / "tests" / "cpp"
CUDA = ROOT / "csrc" / "cuda"
PROGRAMS = tuple(f"test_cuda{part}" for part in ("", "_plane", "_foreach", "_rows", "_launch"))
# Undefined behaviour ends a run: misaligned 128-bit accesses, shifts and indices out of range.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fsanitize=undefined",
    # Guards around buffers see what these three do, which take half of the compiler's time.
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
    "-DFLATKERN_EMULATE",
    f"-I{CPP}",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def fused():
    """For the portable kernels: they fuse where the target can, which x86 has to be told."""
    cpuinfo = Path("/proc/cpuinfo")
    return ["-mfma"] if cpuinfo.exists() and " fma " in cpuinfo.read_text() else []


# Of csrc/cpu, which is compiled once for all files of tests. -O1 takes half as long as -O3.
CPU_FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-maybe-uninitialized",
    *fused(),
]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="an installed copy has no csrc"),
]


def objects_folder(tmp_path_factory) -> Path:
    """One for all tests of all workers, so that each source is compiled once."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder


def compile_object(source: Path, folder: Path, flags: list[str]) -> Path:
    target = folder / f"{source.name}.o"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            subprocess.run(["g++", *flags, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """One program per test, linked from the kernels' objects."""
    folder = objects_folder(tmp_path_factory)
    jobs = [
        (source, FLAGS) for source in sorted(CUDA.glob("*.cu")) if "residual" not in source.name
    ]
    jobs += [(CPP / f"{name}.cpp", FLAGS) for name in PROGRAMS]
    jobs += [(ROOT / "csrc/cpu/isa_portable.cpp", CPU_FLAGS)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        built = list(pool.map(lambda job: compile_object(job[0], folder, job[1]), jobs))
    shared = [path for path in built if not path.name.startswith("test_")]
    for name in PROGRAMS:
        objects = [folder / f"{name}.cpp.o", *shared]
        command = ["g++", "-fsanitize=undefined", *objects, "-o", folder / name]
        subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_emulated(programs, name):
    result = subprocess.run([programs / name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
