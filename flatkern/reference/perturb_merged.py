"""Row norm of the merged weight, scale and perturbation as one op, in plain PyTorch."""

import math
from typing import Any

from torch import Tensor

from flatkern.reference.perturb import perturb_
from flatkern.reference.row_norm import row_norm


def perturb_merged_(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float,
    key: Tensor,
    **where: Any,
) -> Tensor:
    """c = sigma / sqrt(n) * ||(W + s B A)_i||, then `perturb_`; returns c, float32 [m]."""
    columns = max(weight.shape[1], 1)
    row_scale = row_norm(weight, lora_A, lora_B, scaling) * (sigma / math.sqrt(columns))
    perturb_(weight, row_scale, key, **where)
    return row_scale
