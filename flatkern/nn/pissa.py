"""PiSSA: adapters that start as the principal part of the weight."""

import torch
from torch import Tensor

from flatkern.ops import _check


def pissa_factors(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] with s B A = U_r S_r V_r^T of the SVD of W; root(S_r / s) on either.

    What is left for the base, W - s B A, is rounded to W's dtype, so that over 16 bits the layer
    starts half an ulp of that residual away from W. Source: Meng et al., "PiSSA", 2024, equations
    2 to 4; PEFT.

    Raises:
        ValueError: r above the sizes of the weight.
    """
    if r > min(weight.shape):
        accepted = f"at most {min(weight.shape)} with init_lora_weights='pissa'"
        _check.refuse("LoRALinear", "r", accepted, r)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, sizes, vh = torch.linalg.svd(wide, full_matrices=False)
    root = (sizes[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
