"""Row norms of the merged weight, without the merged weight."""

import torch
from torch import Tensor

from flatkern.ops import _check
from flatkern.ops._library import as_matrix, define, implement, kernel

define(
    "row_norm",
    "(Tensor weight, Tensor? lora_A=None, Tensor? lora_B=None, float scaling=1.0) -> Tensor",
)


def row_norm(
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """||(W + s B A)_i||_2 for every row i; W + s B A is never materialised.

    A constant to autograd: the scale of the noise is not trained through. Source: Flat-LoRA,
    the filter norms of its equation for the perturbation's standard deviation.

    Args:
        weight: [m, n] float32, bfloat16, float16 or float64 (reference); unit column stride.
        lora_A: [r, n], any floating dtype; None with lora_B.
        lora_B: [m, r], any floating dtype; None with lora_A.
        scaling: s, finite.

    Returns:
        float32 [m], accumulated in float32 or wider.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device.

    Equivalent eager code:

        (weight.float() + scaling * lora_B.float() @ lora_A.float()).norm(dim=1)
    """
    _check.kinds("row_norm", Tensor, weight=weight)
    _check.kinds("row_norm", Tensor, optional=True, lora_A=lora_A, lora_B=lora_B)
    _check.kinds("row_norm", (float, int), scaling=scaling)
    lora_A = None if lora_A is None else lora_A.detach()
    lora_B = None if lora_B is None else lora_B.detach()
    return torch.ops.flatkern.row_norm(weight.detach(), lora_A, lora_B, scaling)


def _check_values(weight, lora_A, lora_B, scaling):
    shape = _check.weight("row_norm", weight)
    _check.adapters("row_norm", lora_A, lora_B, scaling, shape, weight.device)


def _select(weight, lora_A=None, lora_B=None, scaling=1.0):
    _check_values(weight, lora_A, lora_B, scaling)
    return kernel("row_norm", weight)(as_matrix(weight), lora_A, lora_B, scaling)


def _fake(weight, lora_A=None, lora_B=None, scaling=1.0):
    _check_values(weight, lora_A, lora_B, scaling)
    return weight.new_empty((weight.shape[0],), dtype=torch.float32)


implement("row_norm", _select, _fake)
