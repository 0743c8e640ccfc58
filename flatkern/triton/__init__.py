"""Triton kernels: one file per op, the names and signatures of `flatkern.reference`.

Functions here trust their arguments: `flatkern.ops` has checked them, and hands over weights as
2-D matrices. Nothing reads the key on the host. Imports without Triton; `why_unusable` tells.
"""

import os
import shutil
from importlib import metadata

import torch

from flatkern._machine import TRITON_INTERPRETED, why_too_old

try:
    import triton
except ImportError as error:
    _not_imported = f"triton cannot be imported: {error}"
else:
    _not_imported = None
    from flatkern.triton.noise import noise, philox_bits, uniform
    from flatkern.triton.perturb import perturb, perturb_, perturb_out, restore_
    from flatkern.triton.perturb_merged import perturb_merged_
    from flatkern.triton.perturb_plane import perturb_plane
    from flatkern.triton.row_norm import row_norm

OLDEST = (3, 6)
# From here on the interpreter works with numpy 2.4, which converts only 0-d arrays to numbers.
INTERPRETER_MENDED = (3, 8)

__all__ = [
    "noise",
    "perturb",
    "perturb_",
    "perturb_merged_",
    "perturb_out",
    "perturb_plane",
    "philox_bits",
    "restore_",
    "row_norm",
    "uniform",
    "why_unusable",
]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def interpreter_fault() -> str | None:
    """Why this Triton's interpreter cannot run the kernels, or None if it can."""
    numpy = _version(metadata.version("numpy"))
    if _version(triton.__version__) < INTERPRETER_MENDED and numpy >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy older than 2.4"
    return None


def why_unusable() -> str | None:
    """Why the Triton kernels cannot run here, or None if they can."""
    if _not_imported is not None:
        return _not_imported
    if _version(triton.__version__) < OLDEST:
        return f"triton {triton.__version__} is older than 3.6"
    if triton.knobs.runtime.interpret != TRITON_INTERPRETED:
        return "TRITON_INTERPRET was changed after flatkern was imported"
    if TRITON_INTERPRETED:
        return interpreter_fault()
    if torch.version.hip is not None:
        return "on ROCm flatkern has the reference alone"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 interprets on the CPU, for tests)"
    if (reason := why_too_old(torch.cuda.get_device_capability())) is not None:
        return reason
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "clang", "gcc") if name):
        return "Triton needs a C compiler at run time, to build its launchers"
    return None
