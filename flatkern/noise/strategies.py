"""Scale strategies: from weights to the standard deviations of the noise of each row.

Each takes lists (weights [m, n], lora_As [r, n], lora_Bs [m, r], scalings s; the adapters None
where there are none) and sigma, and returns c of every weight, float32 [m], on its device: few
launches for a whole model. W' is the merged weight W + s B A. Weights of other dimensions are seen
as dim0 x rest: each element of a vector is a row. Where weights are sharded, c is of the whole
weight, the same on every rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatkern.noise.shards import row_norms

Adapters = list[Tensor] | None
Strategy = Callable[[list[Tensor], Adapters, Adapters, list[float], float], list[Tensor]]


def gaussian(
    weights: list[Tensor], lora_As: Adapters, lora_Bs: Adapters, scalings: list[float], sigma: float
) -> list[Tensor]:
    """c_i = sigma: the same standard deviation everywhere. Source: RWP (Li et al., 2022)."""
    return [torch.full((w.shape[0],), sigma, dtype=torch.float32, device=w.device) for w in weights]


def matrix(
    weights: list[Tensor], lora_As: Adapters, lora_Bs: Adapters, scalings: list[float], sigma: float
) -> list[Tensor]:
    """c_i = sigma ||W'||, Frobenius."""
    norms = row_norms(weights, lora_As, lora_Bs, scalings)
    return [(norm.norm() * sigma).repeat(norm.shape[0]) for norm in norms]


def row(
    weights: list[Tensor], lora_As: Adapters, lora_Bs: Adapters, scalings: list[float], sigma: float
) -> list[Tensor]:
    """c_i = sigma ||W'_i||; of a vector, sigma times the norm of all of it.

    Source: LPF-SGD's code (Bisla et al., 2022).
    """
    norms = row_norms(weights, lora_As, lora_Bs, scalings)
    for index, weight in enumerate(weights):
        if weight.dim() < 2:
            norms[index] = norms[index].norm().repeat(norms[index].shape[0])
    return torch._foreach_mul(norms, sigma)


def flat_lora(
    weights: list[Tensor], lora_As: Adapters, lora_Bs: Adapters, scalings: list[float], sigma: float
) -> list[Tensor]:
    """c_i = sigma / sqrt(n) ||W'_i||: a row's noise is about sigma times as long as the row.

    The same bits as `perturb_merged_`. Source: Flat-LoRA (Li et al., 2024), equation 7.
    """
    factors = [sigma / math.sqrt(max(weight.shape[1:].numel(), 1)) for weight in weights]
    return torch._foreach_mul(row_norms(weights, lora_As, lora_Bs, scalings), factors)


# "element" multiplies its c by |W_ij| of the weight that is written; "fisher" divides its c by
# what a `Fisher` knows.
STRATEGIES: dict[str, Strategy] = {
    "gaussian": gaussian,
    "matrix": matrix,
    "element": gaussian,
    "row": row,
    "flat_lora": flat_lora,
    "fisher": row,
}
