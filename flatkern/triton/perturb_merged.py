"""Row norm, scale and perturbation: two kernels, which together take less time than one did."""

import math

from torch import Tensor

from flatkern.triton.perturb import perturb_
from flatkern.triton.row_norm import scaled_row_norm


def perturb_merged_(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """c = sigma / sqrt(n) * ||(W + s B A)_i||, then `perturb_`; returns c, float32 [m]."""
    relative_scale = sigma / math.sqrt(max(weight.shape[1], 1))
    row_scale = scaled_row_norm(weight, lora_A, lora_B, scaling, relative_scale)
    perturb_(weight, row_scale, key, elementwise=elementwise, row_offset=row_offset)
    return row_scale
