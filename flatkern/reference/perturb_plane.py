"""Add a combination of two noises to a weight, in plain PyTorch."""

import torch
from torch import Tensor

from flatkern.reference.noise import noise as normals


def perturb_plane(
    weight: Tensor,
    row_scales: Tensor,
    keys: Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    out: Tensor,
) -> None:
    """W + e into `out`, rounded once; e_ij = c_i z_ij + d_i y_ij, its parts rounded first.

    A non-finite scale counts as 0; what is not finite, or would not stay so, is left as it is.
    """
    place = {"row_offset": row_offset, "col_offset": col_offset}
    z, y = (normals(*weight.shape, key, **place) for key in keys)
    c, d = torch.where(torch.isfinite(row_scales), row_scales, 0.0)[:, :, None]
    e = c * z + d * y
    wide = weight if weight.dtype == torch.float64 else weight.float()
    noisy = (wide + e.to(wide.dtype)).to(weight.dtype)
    out.copy_(torch.where(torch.isfinite(noisy), noisy, weight))
