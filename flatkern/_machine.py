"""What this process and its GPU are, for whoever chooses an implementation or is one."""

import os

# Triton's interpreter, switched on before triton is imported, runs the kernels on CPU tensors.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1",
    "true",
    "yes",
    "on",
    "y",
)


def why_too_old(capability: tuple[int, int]) -> str | None:
    """Why neither CUDA's nor Triton's kernels run on a GPU, or None."""
    if capability >= (8, 0):
        return None
    return "the kernels need a GPU of compute capability 8.0 or higher"
