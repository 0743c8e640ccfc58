"""Triton kernels: one file per op, the names and signatures of `flatkern.reference`.

Functions here trust their arguments: `flatkern.ops` has checked them, and hands over weights as
2-D matrices. Nothing reads the key on the host. Imports without Triton; `why_unusable` tells.
"""

import os
import shutil

import torch

from flatkern._backend import TRITON_INTERPRETED

try:
    import triton
except ImportError as error:
    _not_imported = f"triton cannot be imported: {error}"
else:
    _not_imported = None
    from flatkern.triton.noise import noise, philox_bits
    from flatkern.triton.perturb import perturb, perturb_, perturb_out, restore_
    from flatkern.triton.perturb_merged import perturb_merged_
    from flatkern.triton.row_norm import row_norm

OLDEST = (3, 6)

__all__ = [
    "noise",
    "perturb",
    "perturb_",
    "perturb_merged_",
    "perturb_out",
    "philox_bits",
    "restore_",
    "row_norm",
    "why_unusable",
]


def why_unusable() -> str | None:
    """Why the Triton kernels cannot run here, or None if they can."""
    if _not_imported is not None:
        return _not_imported
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than 3.6"
    if triton.knobs.runtime.interpret != TRITON_INTERPRETED:
        return "TRITON_INTERPRET was changed after flatkern was imported"
    if TRITON_INTERPRETED:
        return None
    if torch.version.hip is not None:
        return "on ROCm flatkern has the reference alone"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 interprets on the CPU, for tests)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or higher"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "clang", "gcc") if name):
        return "Triton needs a C compiler at run time, to build its launchers"
    return None
