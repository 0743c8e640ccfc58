"""Add noise to a weight, and take it off again, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from flatkern._noise import Noise
from flatkern.reference import header
from flatkern.reference import residual as exact
from flatkern.reference.noise import noise as normals


def _row_noise(weight: Tensor, noise: Noise) -> Tensor:
    """c_i z_ij in float32; a non-finite c_i counts as 0."""
    place = {"row_offset": noise.row_offset, "col_offset": noise.col_offset}
    z = normals(*weight.shape, noise.key, **place)
    c = torch.where(torch.isfinite(noise.row_scale), noise.row_scale, 0.0)
    return c[:, None] * z


def _wide(weight: Tensor) -> Tensor:
    """The dtype that sums are taken in: float32, or float64 for a float64 weight."""
    return weight if weight.dtype == torch.float64 else weight.float()


def perturb(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    dtype: torch.dtype | None = None,
    **where: Any,
) -> Tensor:
    """W + e rounded once to `dtype` (default: the weight's); e = c_i z_ij (|W_ij|).

    `where` is elementwise, row_offset and col_offset, here and below: see `Noise`.
    """
    return _perturbed(weight, Noise(row_scale, key, **where), dtype or weight.dtype)


def _perturbed(weight: Tensor, noise: Noise, dtype: torch.dtype) -> Tensor:
    wide = _wide(weight)
    e = _row_noise(weight, noise).to(wide.dtype)
    if noise.elementwise:
        e = e * wide.abs()
    noisy = (wide + e).to(dtype)
    # NaN, infinities and sums that overflow: the element is left as it is.
    return torch.where(torch.isfinite(noisy), noisy, weight.to(dtype))


def perturb_out(
    weight: Tensor, row_scale: Tensor, key: Tensor, *, out: Tensor, **where: Any
) -> None:
    """`perturb` into `out`, whose dtype is the result's."""
    out.copy_(_perturbed(weight, Noise(row_scale, key, **where), out.dtype))


def perturb_(
    weight: Tensor, row_scale: Tensor, key: Tensor, *, residual: Tensor | None = None, **where: Any
) -> None:
    """`perturb` in place; with a residual, chunks that it has no room for stay as they are.

    A residual that does not allow it says why, and nothing is written; so in `restore_`.
    """
    noise = Noise(row_scale, key, **where)
    if residual is not None:
        if not header.admits(residual, weight, noise, restore=False):
            return
        header.begin_perturb(residual, weight, noise)
    noisy = _perturbed(weight, noise, weight.dtype)
    if residual is not None:
        e = _row_noise(weight, noise)
        noisy = exact.encode(weight, noisy, e, noise.elementwise, residual)
    weight.copy_(noisy)


def restore_(
    weight: Tensor, row_scale: Tensor, key: Tensor, *, residual: Tensor | None = None, **where: Any
) -> None:
    """Undo `perturb_`: exactly with its residual, but for chunks that changed since.

    Without one, up to rounding: S - e, or S / (1 + c_i z_ij sign(S)) if elementwise.
    """
    noise = Noise(row_scale, key, **where)
    if residual is not None:
        if not header.admits(residual, weight, noise, restore=True):
            return
        e = _row_noise(weight, noise)
        clean, refused = exact.decode(weight, e, noise.elementwise, residual)
        if refused.any():
            # An interruption between the two writes of a call left W, and the residual filled.
            again = _perturbed(weight, noise, weight.dtype)
            refused &= ~exact.holds(again, residual)
        weight.copy_(clean)
        exact.settle(residual, weight, refused)
        header.finish_restore(residual)
        return
    wide = _wide(weight)
    e = _row_noise(weight, noise).to(wide.dtype)
    if noise.elementwise:
        factor = 1.0 + e * torch.sign(wide)
        # Noise that took (nearly) all of an element, or flipped its sign, cannot be divided out.
        clean = torch.where(factor > 1.0 / 16.0, wide / factor, wide)
    else:
        clean = wide - e
    clean = clean.to(weight.dtype)
    weight.copy_(torch.where(torch.isfinite(clean), clean, weight))
