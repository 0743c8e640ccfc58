"""The exact residual: what `perturb_` keeps so that `restore_` brings back the exact bits."""

import torch
from torch import Tensor

from flatkern import _backend
from flatkern.ops import _check, _residual
from flatkern.ops._library import define, implement
from flatkern.reference.header import create
from flatkern.reference.residual import HEADER_BYTES

define("new_residual", "(Tensor weight, SymInt? pool_bytes=None) -> Tensor", native=False)
define("check_residual", "(Tensor residual) -> ()", native=False)


def new_residual(weight: Tensor, pool_bytes: int | None = None) -> Tensor:
    """An empty residual, for `perturb_`, `perturb_merged_` and `restore_` of this weight.

    It is filled by a perturbation and emptied by its restore, again and again. It serves any
    weight of the same shape and dtype, one at a time. Backends: cpu, cuda and reference.

    Args:
        weight: [m, n], see `perturb`; its shape, dtype and device count, its values do not.
        pool_bytes: room for what perturbations take from the weight, at least 0. None takes the
            worst case, the weight's size and 1 %. Typical weights need 0.15, 0.23, 0.30 bits per
            element at sigma = 0.05, 0.10, 0.15 in bfloat16. Chunks of 4096 elements that find no
            room are not perturbed: `check_residual` says so, and restore is exact all the same.

    Returns:
        uint8 [bytes] on the weight's device. Its content is private, and of one flatkern version.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, layout or value, or a backend
            without residuals.
    """
    op = "new_residual"
    _check.kinds(op, Tensor, weight=weight)
    _check.kinds(op, (int, torch.SymInt), optional=True, pool_bytes=pool_bytes)
    return torch.ops.flatkern.new_residual(weight.detach(), pool_bytes)


def check_residual(residual: Tensor) -> None:
    """Raise if the last `perturb_` or `restore_` with this residual did not do all it should.

    Synchronises where the residual is on a GPU. With CUDA kernels every refusal is reported here,
    because the calls wait for nothing; elsewhere it has been raised already. A full pool is
    reported here alone.

    Args:
        residual: from `new_residual`.

    Raises:
        TypeError, ValueError: not a residual.
        RuntimeError: chunks that found no room and were not perturbed (the message says how many
            bytes are needed), or that a restore refused; on CUDA, why the call wrote nothing.
    """
    _check.kinds("check_residual", Tensor, residual=residual)
    torch.ops.flatkern.check_residual(residual)


def is_available(weight: Tensor, native: bool = False) -> bool:
    """Whether the backend that serves this weight fills residuals, in kernels if `native`."""
    name = _backend.resolve(weight.device.type, weight.dtype)
    return name in _residual.BACKENDS and not (native and name == "reference")


def is_filled(residual: Tensor) -> bool:
    """Whether a perturbation waits for its restore."""
    return _residual.read(residual).state == _residual.FILLED


def pool_need(residual: Tensor) -> tuple[int, int]:
    """Bytes of pool that the last `perturb_` asked for, and the chunks that found no room."""
    header = _residual.read(residual)
    return 4 * header.asked, header.clean


def _pool_bytes(weight, pool_bytes):
    _check.weight("new_residual", weight)
    if pool_bytes is None:
        return 4 * _residual.layout_of(weight).worst_case
    if pool_bytes < 0:
        _check.refuse("new_residual", "pool_bytes", "None or at least 0", pool_bytes)
    return pool_bytes // 4 * 4


def _allocate(weight, pool_bytes):
    size = _residual.layout_of(weight).pool_begin + pool_bytes
    return torch.empty((size,), dtype=torch.uint8, device=weight.device)


def _select_new(weight, pool_bytes=None):
    pool_bytes = _pool_bytes(weight, pool_bytes)
    _residual.check_backend("new_residual", weight)
    residual = _allocate(weight, pool_bytes)
    residual[: _residual.layout_of(weight).pool_begin] = 0
    create(residual, _residual.new_header(weight, pool_bytes // 4))
    return residual


def _fake_new(weight, pool_bytes=None):
    return _allocate(weight, _pool_bytes(weight, pool_bytes))


def _select_check(residual):
    _fake_check(residual)
    _residual.raise_for("check_residual", _residual.read(residual))


def _fake_check(residual):
    if residual.dtype != torch.uint8 or residual.dim() != 1 or residual.shape[0] < HEADER_BYTES:
        _check.refuse("check_residual", "residual", "what new_residual returns", residual)


implement("new_residual", _select_new, _fake_new)
implement("check_residual", _select_check, _fake_check)
# It returns nothing and writes nothing: without this a compiler drops it.
torch.fx.node.has_side_effect(torch.ops.flatkern.check_residual.default)
