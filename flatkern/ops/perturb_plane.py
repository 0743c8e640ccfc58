"""A point of a plane through a weight, spanned by two noises: `perturb_plane`."""

import torch
from torch import Tensor

from flatkern.ops import _check
from flatkern.ops._library import as_matrix, bump_version, define, implement, kernel

_OP = "perturb_plane"
_ARGUMENTS = (
    "(Tensor weight, Tensor row_scales, Tensor keys, *, SymInt row_offset=0, SymInt col_offset=0"
)
_OUT = f"{_ARGUMENTS}, Tensor(a!) out) -> ()"
# Backends write into what they are given.
define(_OP, f"{_ARGUMENTS}) -> Tensor", native=_OUT)
define(f"{_OP}.out", _OUT, native=False)


def perturb_plane(
    weight: Tensor,
    row_scales: Tensor,
    keys: Tensor,
    *,
    out: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """W + e with e_ij = c_i z_ij + d_i y_ij: one pass, neither noise is stored.

    Both products are rounded to float32, then their sum e, then float32(W) + e, and that once to
    the weight's dtype; with d = 0 the bits are those of `perturb`. A non-finite scale counts as 0;
    an element that is not finite, or whose sum would overflow, is left as it is. Outside autograd,
    as under `torch.no_grad()`. What loss surfaces are made of: rows a z + b y of a plane with
    filter-normalised directions (Li et al., "Visualizing the loss landscape of neural nets", 2018)
    are of this form, orthogonalised or not.

    Args:
        weight: [m, n] float32, bfloat16, float16 or float64 (reference); unit column stride.
            Contiguous weights of other shapes are seen as dim0 x rest.
        row_scales: c and d, contiguous float32 [2, m].
        keys: int64 [2, 4] on the weight's device, the keys of z and y.
        out: where to put the result, of the weight's shape and dtype. It may be the weight itself,
            but not overlap it otherwise.
        row_offset, col_offset: global coordinates of the weight's first element, for shards.

    Returns:
        the noisy weight; `out` if it was given.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device.

    Equivalent eager code:

        e = row_scales[0, :, None] * noise(m, n, keys[0])
        e = e + row_scales[1, :, None] * noise(m, n, keys[1])
        (weight.float() + e).to(weight.dtype)
    """
    _check.kinds(_OP, Tensor, weight=weight, row_scales=row_scales, keys=keys)
    _check.kinds(_OP, Tensor, optional=True, out=out)
    offsets = {"row_offset": row_offset, "col_offset": col_offset}
    _check.kinds(_OP, (int, torch.SymInt), **offsets)
    operands = weight.detach(), row_scales.detach(), keys
    if out is None:
        return torch.ops.flatkern.perturb_plane(*operands, **offsets)
    torch.ops.flatkern.perturb_plane.out(*operands, **offsets, out=out.detach())
    return out


def _check_values(weight, row_scales, keys, row_offset=0, col_offset=0):
    rows, cols = _check.weight(_OP, weight)
    right = row_scales.dtype == torch.float32 and row_scales.shape == (2, rows)
    if not right or row_scales.device != weight.device or not row_scales.is_contiguous():
        accepted = f"contiguous float32 [2, {rows}] on {weight.device}"
        _check.refuse(_OP, "row_scales", accepted, row_scales)
    if keys.dtype != torch.int64 or keys.shape != (2, 4):
        _check.refuse(_OP, "keys", "int64 [2, 4], two of NoiseKey(...).to(device)", keys)
    if keys.device != weight.device:
        _check.refuse(_OP, "keys", f"on the weight's device {weight.device}", keys)
    _check.offsets(_OP, rows, cols, row_offset, col_offset)


def _fake(weight, row_scales, keys, **where):
    _check_values(weight, row_scales, keys, **where)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _fake_out(weight, row_scales, keys, *, out, **where):
    _check_values(weight, row_scales, keys, **where)
    _check.weight(_OP, out, "out")
    if out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        dtype = str(weight.dtype).removeprefix("torch.")
        accepted = f"{dtype} {list(weight.shape)} on {weight.device}"
        _check.refuse(_OP, "out", accepted, out)


def _run(weight, row_scales, keys, out, where):
    run = kernel(_OP, weight)
    run(as_matrix(weight), row_scales, keys.contiguous(), **where, out=as_matrix(out))


def _select(weight, row_scales, keys, **where):
    out = _fake(weight, row_scales, keys, **where)
    _run(weight, row_scales, keys, out, where)
    return out


def _select_out(weight, row_scales, keys, *, out, **where):
    _fake_out(weight, row_scales, keys, out=out, **where)
    _check.no_overlap(_OP, out, weight)
    _run(weight, row_scales, keys, out, where)
    bump_version(out)


implement(_OP, _select, _fake)
implement(f"{_OP}.out", _select_out, _fake_out)
