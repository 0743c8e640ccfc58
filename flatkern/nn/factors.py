"""Kinds of adapter as plain factors: (A, B) such that the weight seen is W + s B A."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider, where a product is rounded by less than a row norm is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def singular_factors(
    weight: Tensor, r: int, diagonal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A = V_r^T D^-1 [r, n] and B = U_r S_r [m, r] of W D = U S V^T; D = 1 if it is None."""
    scale = weight.new_ones(weight.shape[1]) if diagonal is None else diagonal.to(weight)
    u, sizes, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    return vh[:r] / scale, u[:, :r] * sizes[:r]


def nora_factors(
    lora_A: Tensor, lora_B: Tensor, nora_A: Tensor, nora_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A' A [r', n] and B B' [m, r'] from the outer [r, n], [m, r], inner [r', r], [r, r'], wide."""
    # Small products, wide: the noise's row scale must not depend on autocast or on 16 bits.
    with torch.autocast(lora_A.device.type, enabled=False):
        return wide(nora_A) @ wide(lora_A), wide(lora_B) @ wide(nora_B)


def bda_factors(lora_A: Tensor, lora_B: Tensor, lora_D: Tensor) -> tuple[Tensor, Tensor]:
    """D A [r, n] and B [m, r], wide; D is a diagonal [r] or a matrix [r, r]."""
    with torch.autocast(lora_A.device.type, enabled=False):
        D, A = wide(lora_D), wide(lora_A)
        return (D @ A if D.dim() == 2 else D[:, None] * A), wide(lora_B)


def adalora_factors(
    lora_A: Tensor, lora_B: Tensor, lora_E: Tensor, lora_alpha: float, ranknum: float
) -> tuple[Tensor, Tensor, float]:
    """(A', B, s) with W + s B A' = W + alpha / (r + 1e-5) B diag(E) A.

    A rank that the allocator pruned has E = 0, so the row norms follow the current mask; r is the
    initial rank, which PEFT does not lower. There is no layer of this kind here: one makes sense
    with the allocator alone, which is PEFT's. Source: Zhang et al., "AdaLoRA", 2023; PEFT's
    `SVDLinear`.

    Args:
        lora_A, lora_B: [r, n] and [m, r].
        lora_E: [r, 1], the masked singular values.
        lora_alpha: alpha; not above 0 it counts as r, as in PEFT.
        ranknum: r as PEFT keeps it.
    """
    alpha = lora_alpha if lora_alpha > 0 else ranknum
    return wide(lora_A) * wide(lora_E), lora_B, float(alpha) / (float(ranknum) + 1e-5)
