"""Add noise to a weight: `perturb` out of place, `perturb_` and `restore_` in place."""

import torch
from torch import Tensor

from flatkern._noise import Noise
from flatkern.ops import _check, _residual
from flatkern.ops._library import as_matrix, bump_version, bump_versions, define, implement, kernel

_OFFSETS = "SymInt row_offset=0, SymInt col_offset=0"
_INPLACE = (
    "(Tensor(a!) weight, Tensor row_scale, Tensor key, *, bool elementwise=False, "
    f"Tensor(b!)? residual=None, {_OFFSETS}) -> ()"
)
define(
    "perturb",
    "(Tensor weight, Tensor row_scale, Tensor key, *, bool elementwise=False, "
    f"ScalarType? dtype=None, {_OFFSETS}) -> Tensor",
)
# Returns nothing: torch's functionalisation refuses custom ops that return what they write.
define(
    "perturb.out",
    "(Tensor weight, Tensor row_scale, Tensor key, *, bool elementwise=False, "
    f"{_OFFSETS}, Tensor(a!) out) -> ()",
)
define("perturb_", _INPLACE)
define("restore_", _INPLACE)


def perturb(
    weight: Tensor,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """W + e with e_ij = c_i z_ij, out of place: one pass, no full-size temporary.

    e is rounded to float32 before it is added to float32(W), and the sum is rounded once to the
    result's dtype. A non-finite c_i counts as 0; an element that is not finite, or whose sum
    would overflow, is left as it is. The noise is a constant to autograd: the gradient of the
    weight is that of the result.

    Args:
        weight: [m, n] float32, bfloat16, float16 or float64 (reference); unit column stride.
            Contiguous weights of other shapes are seen as dim0 x rest.
        row_scale: c, float32 [m], the standard deviation of each row.
        key: int64 [4] on the weight's device, see `flatkern.NoiseKey`.
        elementwise: e_ij = c_i z_ij |W_ij|.
        out: where to put the result, of the weight's shape; its dtype is the result's. It may be
            the weight itself, but not overlap it otherwise.
        dtype: the result's dtype, default the weight's. A lower one adds the noise in the cast.
        row_offset, col_offset: global coordinates of the weight's first element, for shards.

    Returns:
        the noisy weight; `out` if it was given.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device.

    Equivalent eager code:

        e = row_scale[:, None] * noise(m, n, key)
        (weight.float() + e).to(dtype or weight.dtype)
    """
    noise = Noise(row_scale, key, elementwise, row_offset, col_offset)
    _check_kinds("perturb", weight, noise)
    _check.kinds("perturb", Tensor, optional=True, out=out)
    _check.kinds("perturb", torch.dtype, optional=True, dtype=dtype)
    noise = noise._replace(row_scale=row_scale.detach())
    if out is None:
        return torch.ops.flatkern.perturb(weight, *noise.tensors, dtype=dtype, **noise.options)
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"perturb: dtype must be out's {out.dtype} or None, got {dtype}")
    torch.ops.flatkern.perturb.out(weight, *noise.tensors, **noise.options, out=out)
    return out


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
    """`perturb` in place: a write outside autograd, as under `torch.no_grad()`.

    The weight's version counter is bumped, so a backward that saved the old weight raises.

    Args:
        weight: [m, n], see `perturb`; written.
        row_scale: c, float32 [m].
        key: int64 [4] on the weight's device.
        elementwise: e_ij = c_i z_ij |W_ij|.
        residual: from `new_residual`, empty; filled with what `restore_` needs to bring back the
            exact bits, and written. One that was given too few bytes leaves chunks unperturbed:
            see `check_residual`. Backends: cpu, cuda and reference.
        row_offset, col_offset: global coordinates of the weight's first element.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device;
            nothing was written.
        RuntimeError: the residual is filled already; nothing was written. On CUDA
            `check_residual` raises it.
    """
    noise = Noise(row_scale, key, elementwise, row_offset, col_offset)
    _check_kinds("perturb_", weight, noise)
    _check.kinds("perturb_", Tensor, optional=True, residual=residual)
    torch.ops.flatkern.perturb_(weight.detach(), *noise.tensors, residual=residual, **noise.options)


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
    """Undo `perturb_` with the same arguments: exactly with its residual, else up to rounding.

    Without a residual this is lossy: where the noise lifted an element into a higher binade its
    low bits are gone (4.6 % of bfloat16 weights at sigma = 0.05). With one every bit comes back,
    NaN payloads included. Each chunk of 4096 elements is compared with a check word first: one
    that changed since `perturb_` is left alone, the others are restored, and a RuntimeError says
    so. Put back the noisy values of such a chunk and call again to go on.

    Args:
        weight: the perturbed weight; written.
        row_scale, key, elementwise, row_offset, col_offset: as given to `perturb_`.
        residual: the one that `perturb_` filled, or None; emptied.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device;
            nothing was written.
        RuntimeError: the residual is empty, or was filled with another key, row scale, offset,
            form or backend: nothing was written. Or the weight was changed, see above. On CUDA
            `check_residual` raises all of these.
    """
    noise = Noise(row_scale, key, elementwise, row_offset, col_offset)
    _check_kinds("restore_", weight, noise)
    _check.kinds("restore_", Tensor, optional=True, residual=residual)
    torch.ops.flatkern.restore_(weight.detach(), *noise.tensors, residual=residual, **noise.options)


def _check_kinds(op, weight, noise):
    _check.kinds(op, Tensor, weight=weight, row_scale=noise.row_scale, key=noise.key)
    _check.kinds(op, bool, elementwise=noise.elementwise)
    offsets = {"row_offset": noise.row_offset, "col_offset": noise.col_offset}
    _check.kinds(op, (int, torch.SymInt), **offsets)


def check_values(op, weight, noise):
    """The checks that every op with a weight, a row scale and a key shares."""
    rows, cols = _check.weight(op, weight)
    _check.row_scale(op, noise.row_scale, rows, weight)
    _check.key(op, noise.key, weight)
    _check.offsets(op, rows, cols, noise.row_offset, noise.col_offset)


# Selectors and fakes get what differs from the schema's defaults: `where` is of Noise.


def _select_perturb(weight, row_scale, key, *, dtype=None, **where):
    out = _fake_perturb(weight, row_scale, key, dtype=dtype, **where)
    run = kernel("perturb_out", weight)
    noise = Noise(row_scale, key, **where)
    run(as_matrix(weight), *noise.tensors, **noise.options, out=as_matrix(out))
    return out


def _check_perturb(weight, noise, dtype, argument="dtype"):
    check_values("perturb", weight, noise)
    accepted = [d for d in _check.FLOAT_DTYPES if d != torch.float64 or weight.dtype == d]
    if dtype is not None and dtype not in accepted:
        names = " or ".join(str(d).removeprefix("torch.") for d in accepted)
        raise ValueError(
            f"perturb: {argument} must be {names} for a {weight.dtype} weight, got {dtype}"
        )


def _fake_perturb(weight, row_scale, key, *, dtype=None, **where):
    _check_perturb(weight, Noise(row_scale, key, **where), dtype)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)


def _select_out(weight, row_scale, key, *, out, **where):
    _fake_out(weight, row_scale, key, out=out, **where)
    _check.no_overlap("perturb", out, weight)
    run = kernel("perturb_out", weight)
    noise = Noise(row_scale, key, **where)
    run(as_matrix(weight), *noise.tensors, **noise.options, out=as_matrix(out))
    bump_version(out)


def _fake_out(weight, row_scale, key, *, out, **where):
    _check_perturb(weight, Noise(row_scale, key, **where), out.dtype, "out")
    _check.weight("perturb", out, "out")
    if out.shape != weight.shape or out.device != weight.device:
        _check.refuse("perturb", "out", f"{list(weight.shape)} on {weight.device}", out)


def run_inplace(op, weight, noise, residual, named=None):
    """Run `perturb_` or `restore_` on a backend; errors are those of the op `named`."""
    named = named or op
    if residual is not None:
        _residual.check_place(named, residual, weight)
    run = kernel(op, weight)
    run(as_matrix(weight), *noise.tensors, residual=residual, **noise.options)
    header = None
    if residual is not None and not _residual.in_kernels(weight):
        header = _residual.read(residual)
        _residual.raise_refused(named, header)
    bump_versions([weight] if residual is None else [weight, residual])
    if header is not None:
        _residual.raise_mismatched(named, header)


def _inplace(op):
    """Selector and fake of `perturb_` or `restore_`, which differ in the kernel alone."""

    def fake(weight, row_scale, key, *, residual=None, **where):
        check_values(op, weight, Noise(row_scale, key, **where))
        _residual.check(op, residual, weight)

    def select(weight, row_scale, key, *, residual=None, **where):
        fake(weight, row_scale, key, residual=residual, **where)
        run_inplace(op, weight, Noise(row_scale, key, **where), residual)

    return select, fake


implement("perturb", _select_perturb, _fake_perturb)
implement("perturb.out", _select_out, _fake_out)
implement("perturb_", *_inplace("perturb_"))
implement("restore_", *_inplace("restore_"))


def _save_dtype(ctx, inputs, keyword_only_inputs, output):
    ctx.weight_dtype = inputs[0].dtype


def _perturb_backward(ctx, grad):
    return grad.to(ctx.weight_dtype), None, None


torch.library.register_autograd("flatkern::perturb", _perturb_backward, setup_context=_save_dtype)
