"""Scale strategies: from a weight to the standard deviation of the noise of each row.

Each takes (weight [m, n], lora_A [r, n], lora_B [m, r], scaling s, sigma) and returns c, float32
[m], on the weight's device. W' is the merged weight W + s B A.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatkern import ops

Strategy = Callable[[Tensor, Tensor | None, Tensor | None, float, float], Tensor]


def gaussian(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, sigma: float
) -> Tensor:
    """c_i = sigma: the same standard deviation everywhere. Source: RWP (Li et al., 2022)."""
    return torch.full((weight.shape[0],), sigma, dtype=torch.float32, device=weight.device)


def row(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, sigma: float
) -> Tensor:
    """c_i = sigma ||W'_i||. Source: LPF-SGD's code (Bisla et al., 2022)."""
    return ops.row_norm(weight, lora_A, lora_B, scaling) * sigma


def flat_lora(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, sigma: float
) -> Tensor:
    """c_i = sigma / sqrt(n) ||W'_i||: a row's noise is about sigma times as long as the row.

    The same bits as `perturb_merged_`. Source: Flat-LoRA (Li et al., 2024), equation 7.
    """
    columns = max(weight[:1].numel(), 1)
    return ops.row_norm(weight, lora_A, lora_B, scaling) * (sigma / math.sqrt(columns))


STRATEGIES: dict[str, Strategy] = {"gaussian": gaussian, "row": row, "flat_lora": flat_lora}
