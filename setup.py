"""Builds flatkern._C: CPU kernels where a C++ compiler is, CUDA kernels where nvcc is as well.

`pip install --no-build-isolation .` builds against the installed torch. An isolated build sees no
torch, and then, as without a compiler, flatkern installs as pure Python and says so.

FLATKERN_CUDA=auto (default) builds the CUDA kernels if nvcc and a CUDA build of torch are there,
whether or not a GPU is; 1 insists, 0 leaves them out. TORCH_CUDA_ARCH_LIST and MAX_JOBS are
torch's own.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# No fast-math, and no contraction: results are specified to the bit.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-maybe-uninitialized",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
# Code for 8.0 also runs on 8.6 and 8.9; PTX of the last serves what comes after it.
CUDA_ARCHS = ("8.0", "9.0", "10.0")


def cuda_setting() -> str:
    setting = os.environ.get("FLATKERN_CUDA") or "auto"
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"flatkern: FLATKERN_CUDA must be auto, 0 or 1, got {setting!r}")
    return setting


def require_cuda(reason: str) -> None:
    """Ends an installation that insists on CUDA kernels but cannot have them."""
    if cuda_setting() == "1":
        raise SystemExit(f"flatkern: FLATKERN_CUDA=1 asks for CUDA kernels, but {reason}")


def pure_python(reason: str) -> dict:
    require_cuda(reason)
    # pip runs this file several times; only the run that builds speaks.
    if {"bdist_wheel", "editable_wheel"} & set(sys.argv):
        print(
            f"flatkern: {reason}; installing without native kernels "
            "(pure PyTorch does everything, slower)",
            file=sys.stderr,
        )
    return {}


def find_nvcc() -> Path | None:
    """The nvcc that would build, also where what is on the path only forwards to it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = f"{home}/bin" if home else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    found = shutil.which("nvcc", path=places)
    if found is None:
        return None
    plan = run(found, "--dryrun", "-x", "cu", os.devnull)
    folder = re.search(r"^#\$ _HERE_=(.+)$", plan, re.MULTILINE)
    return Path(folder[1], "nvcc") if folder else Path(found)


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def cuda_archs(nvcc: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, or those of the default that this nvcc knows, the last with PTX."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    known = run(str(nvcc), "--list-gpu-arch").split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    return ";".join(archs) + "+PTX"


def cuda_plan(torch_cuda: str | None) -> tuple[Path | None, str]:
    """Which nvcc builds the CUDA kernels for a torch of this CUDA version; None and why if none."""
    if cuda_setting() == "0":
        return None, "FLATKERN_CUDA=0"
    nvcc = find_nvcc()
    if torch_cuda is None:
        reason = "this torch is built without CUDA"
    elif nvcc is None:
        reason = "nvcc was not found (in CUDA_HOME or, without it, on PATH and in /usr/local/cuda)"
    elif (version := nvcc_version(nvcc)) is None:
        reason = f"{nvcc} --version tells no version"
    elif version.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"nvcc is of CUDA {version}, this torch of CUDA {torch_cuda}"
    else:
        return nvcc, ""
    require_cuda(reason)
    return None, reason


def nvcc_version(nvcc: Path) -> str | None:
    release = re.search(r"release (\S+),", run(str(nvcc), "--version"))
    return release and release[1]


def wheel_includes() -> list[str]:
    """Headers that torch's wheels bring: a toolkit may lack those of cuBLAS and others."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    return [str(path) for folder in folders for path in sorted(Path(folder).glob("*/include"))]


def compiler_version(compiler: str) -> str | None:
    """First line of `compiler --version`, or None where there is no such program."""
    if shutil.which(compiler) is None:
        return None
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.returncode == 0 else None


def extension() -> dict:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return pure_python(
            "torch is not importable in this build (pip install --no-build-isolation)"
        )
    if sys.platform != "linux":
        return pure_python(f"native kernels are built on Linux only, this is {sys.platform}")
    version = compiler_version(cpp_extension.get_cxx_compiler())
    if version is None:
        return pure_python("no C++ compiler was found")

    sources = [*files("csrc/*.cpp"), *files("csrc/cpu/*.cpp")]
    macros = {
        "FLATKERN_TORCH_VERSION": torch.__version__,
        "FLATKERN_COMPILER": version,
        "FLATKERN_CXX_FLAGS": " ".join(CXX_FLAGS),
    }
    nvcc, why_no_cuda = cuda_plan(torch.version.cuda)
    if nvcc is None:
        macros["FLATKERN_WHY_NO_CUDA"] = why_no_cuda
        kind, flags, includes = cpp_extension.CppExtension, CXX_FLAGS, []
    else:
        sources += files("csrc/cuda/*.cpp") + files("csrc/cuda/*.cu")
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(nvcc)
        macros["FLATKERN_CUDA_VERSION"] = nvcc_version(nvcc)
        macros["FLATKERN_CUDA_ARCHS"] = os.environ["TORCH_CUDA_ARCH_LIST"]
        macros["FLATKERN_NVCC_FLAGS"] = " ".join(NVCC_FLAGS)
        cpp_extension.CUDA_HOME = str(nvcc.parents[1])
        kind, includes = cpp_extension.CUDAExtension, wheel_includes()
        flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    build = kind(
        "flatkern._C",
        sources,
        depends=files("csrc/**/*.h"),
        extra_compile_args=flags,
        define_macros=[(name, f'"{value}"') for name, value in macros.items()],
    )
    # After the toolkit's own, which must match nvcc.
    build.include_dirs += includes
    return {"ext_modules": [build], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


if __name__ == "__main__":
    setup(**extension())
