"""Builds flatkern._C: CPU kernels where a C++ compiler is, nothing where there is none.

`pip install --no-build-isolation .` builds against the installed torch. An isolated build sees no
torch, and then, as without a compiler, flatkern installs as pure Python and says so.
"""

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


def pure_python(reason: str) -> dict:
    # pip runs this file several times; only the run that builds speaks.
    if {"bdist_wheel", "editable_wheel"} & set(sys.argv):
        print(
            f"flatkern: {reason}; installing without native kernels "
            "(pure PyTorch does everything, slower)",
            file=sys.stderr,
        )
    return {}


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

    sources = [
        "csrc/module.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    build = cpp_extension.CppExtension(
        "flatkern._C",
        sources,
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")],
        extra_compile_args=CXX_FLAGS,
        define_macros=[
            ("FLATKERN_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FLATKERN_COMPILER", f'"{version}"'),
            ("FLATKERN_CXX_FLAGS", f'"{" ".join(CXX_FLAGS)}"'),
        ],
    )
    return {"ext_modules": [build], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension())
