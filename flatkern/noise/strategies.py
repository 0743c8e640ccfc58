"""Scale strategies: from weights to the standard deviations of the noise of each row.

Each takes lists (out, float32 [m] for each weight; weights [m, n], lora_As [r, n], lora_Bs [m, r],
scalings s; the adapters None where there are none) and sigma, and writes c of every weight: few
launches for a whole model, and nothing allocated per weight. W' is the merged weight W + s B A.
Weights of other dimensions are seen as dim0 x rest: each element of a vector is a row. Where
weights are sharded, c is of the whole weight, the same on every rank. All weights of a call are on
one device and backend.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatkern.nn.shards import row_norms_

Adapters = list[Tensor] | None
Strategy = Callable[[list[Tensor], list[Tensor], Adapters, Adapters, list[float], float], None]


def gaussian(
    out: list[Tensor],
    weights: list[Tensor],
    lora_As: Adapters,
    lora_Bs: Adapters,
    scalings: list[float],
    sigma: float,
) -> None:
    """c_i = sigma: the same standard deviation everywhere. Source: RWP (Li et al., 2022)."""
    torch._foreach_zero_(out)
    torch._foreach_add_(out, sigma)


def matrix(
    out: list[Tensor],
    weights: list[Tensor],
    lora_As: Adapters,
    lora_Bs: Adapters,
    scalings: list[float],
    sigma: float,
) -> None:
    """c_i = sigma ||W'||, Frobenius."""
    row_norms_(out, weights, lora_As, lora_Bs, scalings, [1.0] * len(out))
    for norms in out:
        norms.fill_(norms.norm() * sigma)


def row(
    out: list[Tensor],
    weights: list[Tensor],
    lora_As: Adapters,
    lora_Bs: Adapters,
    scalings: list[float],
    sigma: float,
) -> None:
    """c_i = sigma ||W'_i||; of a vector, sigma times the norm of all of it.

    Source: LPF-SGD's code (Bisla et al., 2022).
    """
    vectors = [weight.dim() < 2 for weight in weights]
    factors = [1.0 if is_vector else sigma for is_vector in vectors]
    row_norms_(out, weights, lora_As, lora_Bs, scalings, factors)
    for norms, is_vector in zip(out, vectors, strict=True):
        if is_vector:
            norms.fill_(norms.norm() * sigma)


def flat_lora(
    out: list[Tensor],
    weights: list[Tensor],
    lora_As: Adapters,
    lora_Bs: Adapters,
    scalings: list[float],
    sigma: float,
) -> None:
    """c_i = sigma / sqrt(n) ||W'_i||: a row's noise is about sigma times as long as the row.

    The same bits as `perturb_merged_`. Source: Flat-LoRA (Li et al., 2024), equation 7.
    """
    factors = [sigma / math.sqrt(max(weight.shape[1:].numel(), 1)) for weight in weights]
    row_norms_(out, weights, lora_As, lora_Bs, scalings, factors)


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
