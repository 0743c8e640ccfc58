"""Row norm, scale and perturbation in one call: on a GPU two launches."""

import math

import torch
from torch import Tensor

from flatkern._noise import Noise
from flatkern.ops import _check, _residual
from flatkern.ops._library import as_matrix, bump_version, define, implement, kernel
from flatkern.ops.perturb import run_inplace

define(
    "perturb_merged_",
    "(Tensor(a!) weight, Tensor? lora_A, Tensor? lora_B, float scaling, float sigma, Tensor key, "
    "*, bool elementwise=False, Tensor(b!)? residual=None, SymInt row_offset=0) -> Tensor",
)


def perturb_merged_(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float,
    key: Tensor,
    *,
    elementwise: bool = False,
    residual: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Flat-LoRA's perturbation in place: c_i = sigma / sqrt(n) ||(W + s B A)_i||, W += c_i z_ij.

    The same bits as `row_norm`, a multiplication and `perturb_`, in one call. Whole rows only;
    for column shards use `row_norm`, reduce, `perturb_`. Source: Flat-LoRA.

    Args:
        weight: [m, n], see `perturb`; written.
        lora_A, lora_B: [r, n] and [m, r], any floating dtype; both None without adapters.
        scaling: s, finite.
        sigma: relative noise strength, finite and at least 0.
        key: int64 [4] on the weight's device.
        elementwise: e_ij = c_i z_ij |W_ij|.
        residual: see `perturb_`.
        row_offset: global row of the weight's first element.

    Returns:
        c, float32 [m], which `restore_` takes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device;
            nothing was written.
        RuntimeError: the residual is filled already; nothing was written.

    Equivalent calls:

        c = row_norm(weight, lora_A, lora_B, scaling) * (sigma / math.sqrt(n))
        perturb_(weight, c, key)
    """
    op = "perturb_merged_"
    _check.kinds(op, Tensor, weight=weight, key=key)
    _check.kinds(op, Tensor, optional=True, lora_A=lora_A, lora_B=lora_B, residual=residual)
    _check.kinds(op, (float, int), scaling=scaling, sigma=sigma)
    _check.kinds(op, bool, elementwise=elementwise)
    _check.kinds(op, (int, torch.SymInt), row_offset=row_offset)
    return torch.ops.flatkern.perturb_merged_(
        weight.detach(),
        None if lora_A is None else lora_A.detach(),
        None if lora_B is None else lora_B.detach(),
        scaling,
        sigma,
        key,
        elementwise=elementwise,
        residual=residual,
        row_offset=row_offset,
    )


def _check_values(weight, lora_A, lora_B, scaling, sigma, key, residual, row_offset):
    op = "perturb_merged_"
    rows, cols = _check.weight(op, weight)
    _check.adapters(op, lora_A, lora_B, scaling, (rows, cols), weight.device)
    _check.finite(op, "sigma", sigma, minimum=0.0)
    _check.key(op, key, weight)
    _check.offsets(op, rows, cols, row_offset, 0)
    _residual.check(op, residual, weight)


def _select(weight, lora_A, lora_B, scaling, sigma, key, *, residual=None, **where):
    _fake(weight, lora_A, lora_B, scaling, sigma, key, residual=residual, **where)
    matrix = as_matrix(weight)
    if residual is None:
        run = kernel("perturb_merged_", weight)
        row_scale = run(matrix, lora_A, lora_B, scaling, sigma, key, **where)
        bump_version(weight)
        return row_scale
    # The residual notes the scale that it is filled for before anything is written: two passes.
    norm = kernel("row_norm", weight)(matrix, lora_A, lora_B, scaling)
    row_scale = norm * (sigma / math.sqrt(max(matrix.shape[1], 1)))
    noise = Noise(row_scale, key, **where)
    run_inplace("perturb_", weight, noise, residual, named="perturb_merged_")
    return row_scale


def _fake(weight, lora_A, lora_B, scaling, sigma, key, *, residual=None, **where):
    row_offset = where.get("row_offset", 0)
    _check_values(weight, lora_A, lora_B, scaling, sigma, key, residual, row_offset)
    return weight.new_empty((weight.shape[0],), dtype=torch.float32)


implement("perturb_merged_", _select, _fake)
