"""Add noise to a weight, and take it off again, in plain PyTorch."""

import torch
from torch import Tensor

from flatkern.reference import header
from flatkern.reference import residual as exact
from flatkern.reference.noise import noise


def _row_noise(
    weight: Tensor, row_scale: Tensor, key: Tensor, row_offset: int, col_offset: int
) -> Tensor:
    """c_i z_ij in float32; a non-finite c_i counts as 0."""
    z = noise(*weight.shape, key, row_offset=row_offset, col_offset=col_offset)
    c = torch.where(torch.isfinite(row_scale), row_scale, 0.0)
    return c[:, None] * z


def _wide(weight: Tensor) -> Tensor:
    """The dtype that sums are taken in: float32, or float64 for a float64 weight."""
    return weight if weight.dtype == torch.float64 else weight.float()


def perturb(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    dtype: torch.dtype | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """W + e rounded once to `dtype` (default: the weight's); e = c_i z_ij (|W_ij|)."""
    dtype = dtype or weight.dtype
    wide = _wide(weight)
    e = _row_noise(weight, row_scale, key, row_offset, col_offset).to(wide.dtype)
    if elementwise:
        e = e * wide.abs()
    noisy = (wide + e).to(dtype)
    # NaN, infinities and sums that overflow: the element is left as it is.
    return torch.where(torch.isfinite(noisy), noisy, weight.to(dtype))


def perturb_out(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    out: Tensor,
) -> None:
    """`perturb` into `out`, whose dtype is the result's."""
    out.copy_(
        perturb(
            weight,
            row_scale,
            key,
            elementwise=elementwise,
            dtype=out.dtype,
            row_offset=row_offset,
            col_offset=col_offset,
        )
    )


def perturb_(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """`perturb` in place; with a residual, chunks that it has no room for stay as they are.

    A residual that does not allow it says why, and nothing is written; so in `restore_`.
    """
    offsets = {"row_offset": row_offset, "col_offset": col_offset}
    call = {"elementwise": elementwise, **offsets}
    if residual is not None:
        if not header.admits(residual, weight, row_scale, key, **call, restore=False):
            return
        header.begin_perturb(residual, weight, row_scale, key, **call)
    noisy = perturb(weight, row_scale, key, **call)
    if residual is not None:
        e = _row_noise(weight, row_scale, key, **offsets)
        noisy = exact.encode(weight, noisy, e, elementwise, residual)
    weight.copy_(noisy)


def restore_(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """Undo `perturb_`: exactly with its residual, but for chunks that changed since.

    Without one, up to rounding: S - e, or S / (1 + c_i z_ij sign(S)) if elementwise.
    """
    where = {"row_offset": row_offset, "col_offset": col_offset}
    e = _row_noise(weight, row_scale, key, **where)
    if residual is not None:
        call = {"elementwise": elementwise, **where}
        if not header.admits(residual, weight, row_scale, key, **call, restore=True):
            return
        clean, refused = exact.decode(weight, e, elementwise, residual)
        weight.copy_(clean)
        exact.settle(residual, weight, refused)
        header.finish_restore(residual)
        return
    wide = _wide(weight)
    e = e.to(wide.dtype)
    if elementwise:
        factor = 1.0 + e * torch.sign(wide)
        # Noise that took (nearly) all of an element, or flipped its sign, cannot be divided out.
        clean = torch.where(factor > 1.0 / 16.0, wide / factor, wide)
    else:
        clean = wide - e
    clean = clean.to(weight.dtype)
    weight.copy_(torch.where(torch.isfinite(clean), clean, weight))
