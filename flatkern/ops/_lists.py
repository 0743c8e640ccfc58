"""Lists of tensors of one device and backend: one call where its kernels take lists.

Nothing is checked here, no version counter is bumped and no refusal of a residual is raised:
`foreach` does so at every call, a window when it makes its lists. Weights are matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern._noise import Noise
from flatkern.ops._library import kernel
from flatkern.reference.header import admits

Tensors = Sequence[Tensor]


def takes_lists(backend: str) -> bool:
    """Whether the backend has kernels for many tensors; the others take one after the other."""
    return backend in ("cpu", "cuda")


def row_scales_(
    backend: str,
    row_scales: Tensors,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
    factors: Sequence[float],
) -> None:
    """row_scales[i] = factors[i] ||(W + s B A)_rows||; parameters are taken as they are.

    Args:
        row_scales: written.
        lora_As, lora_Bs: one of each for every weight, or empty.
        The others are one for every weight.
    """
    if not weights:
        return
    # No autograd: what is written needs none, and a detached view of each tensor would take longer.
    with torch._C._AutoDispatchBelowAutograd():
        if takes_lists(backend):
            run = kernel("foreach_row_scale_", weights[0], backend)
            run(row_scales, weights, lora_As, lora_Bs, scalings, factors)
            return
        run = kernel("row_norm", weights[0], backend)
        none = [None] * len(weights)
        operands = zip(weights, lora_As or none, lora_Bs or none, scalings, strict=True)
        for i, own in enumerate(operands):
            row_scales[i].copy_(run(*own) * factors[i])


def run_inplace(
    op: str,
    backend: str,
    elementwise: bool,
    weights: Tensors,
    row_scales: Tensors,
    keys: Tensors,
    residuals: Tensors,
    row_offsets: Sequence[int],
    col_offsets: Sequence[int],
) -> None:
    """`perturb_` or `restore_` of every weight; with `residuals`, or empty: without."""
    if not weights:
        return
    if takes_lists(backend):
        kernel(f"foreach_{op}", weights[0], backend)(
            weights,
            row_scales,
            keys,
            elementwise=elementwise,
            residuals=residuals,
            row_offsets=row_offsets,
            col_offsets=col_offsets,
        )
        return
    places = zip(row_offsets, col_offsets, strict=True)
    noises = [Noise(row_scales[i], keys[i], elementwise, *place) for i, place in enumerate(places)]
    # All are asked before any is written.
    admitted = [
        admits(residual, weights[i], noises[i], restore=op == "restore_")
        for i, residual in enumerate(residuals)
    ]
    if not all(admitted):
        return
    run = kernel(op, weights[0], backend)
    for i, (weight, noise) in enumerate(zip(weights, noises, strict=True)):
        residual = residuals[i] if residuals else None
        run(weight, *noise.tensors, residual=residual, **noise.options)
