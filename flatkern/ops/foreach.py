"""The ops of a whole model: lists of tensors, in few launches. Names as torch's `_foreach_` ops."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flatkern import _backend
from flatkern._noise import Noise
from flatkern.ops import _check, _residual
from flatkern.ops._library import as_matrix, bump_versions, define, implement
from flatkern.ops._lists import row_scales_, run_inplace
from flatkern.ops.perturb import check_values

# Lists of all tensors; empty adapters and residuals stand for none.
define(
    "foreach_row_norm",
    "(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings) -> Tensor[]",
    native=False,
)
# row_scales[i] = factors[i] ||(W + s B A)_rows||; see ops/_lists.py.
define(
    "foreach_row_scale_",
    "(Tensor(a!)[] row_scales, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "float[] scalings, float[] factors) -> ()",
    public=False,
)
for _op in ("foreach_perturb_", "foreach_restore_"):
    define(
        _op,
        "(Tensor(a!)[] weights, Tensor[] row_scales, Tensor[] keys, *, bool elementwise, "
        "Tensor(b!)[] residuals, SymInt[] row_offsets, SymInt[] col_offsets) -> ()",
    )


def foreach_row_norm(
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor] | None = None,
    lora_Bs: Sequence[Tensor] | None = None,
    scalings: float | Sequence[float] = 1.0,
    *,
    factors: Sequence[float] | None = None,
    out: Sequence[Tensor] | None = None,
    checked: bool = False,
) -> list[Tensor]:
    """`row_norm` of every weight, bit for bit; shapes, dtypes and devices may differ.

    Args:
        weights: see `row_norm`.
        lora_As, lora_Bs: one of each for every weight, or None.
        scalings: one for every weight, or one for all.
        factors: what each weight's norms are multiplied by, in float32; None: 1.
        out: float32 [m] for each weight, written and returned; None: new tensors.
        checked: that such lists passed before, as matrices of one device and backend: then only
            what guards memory is looked at, in a single call into the kernels.

    Returns:
        float32 [m] for each weight.

    Raises:
        TypeError, ValueError: as `row_norm`; or lists of different lengths.
    """
    op = "foreach_row_norm"
    if checked:
        return _write_row_norms(weights, lora_As, lora_Bs, scalings, factors, out)
    _check_list(op, Tensor, "weights", weights)
    if (lora_As is None) != (lora_Bs is None):
        missing, given = ("lora_As", "lora_Bs") if lora_As is None else ("lora_Bs", "lora_As")
        raise ValueError(f"{op}: {missing} must be given together with {given}, got None")
    if lora_As is None:
        lora_As = lora_Bs = ()
    else:
        _check_list(op, Tensor, "lora_As", lora_As, len(weights))
        _check_list(op, Tensor, "lora_Bs", lora_Bs, len(weights))
    _check.kinds(op, (float, int, list, tuple), scalings=scalings)
    if not isinstance(scalings, list | tuple):
        scalings = [scalings] * len(weights)
    _check_list(op, (float, int), "scalings", scalings, len(weights))
    for name, values, accepted in (("factors", factors, (float, int)), ("out", out, Tensor)):
        if values is not None:
            _check_list(op, accepted, name, values, len(weights))
    norms = torch.ops.flatkern.foreach_row_norm(
        [weight.detach() for weight in weights],
        [lora_A.detach() for lora_A in lora_As],
        [lora_B.detach() for lora_B in lora_Bs],
        scalings,
    )
    if factors is not None:
        norms = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
    if out is None:
        return norms
    for i, norm in enumerate(norms):
        _check.row_scale(f"{op}: tensor {i}", out[i], len(norm), norm, "out")
    for result, norm in zip(out, norms, strict=True):
        result.copy_(norm)
    return list(out)


def _write_row_norms(weights, lora_As, lora_Bs, scalings, factors, out):
    """Lists that were checked."""
    if out is None:
        out = [w.new_empty(w.shape[0], dtype=torch.float32) for w in weights]
    if weights:
        backend = _backend.resolve(weights[0].device.type, weights[0].dtype)
        factors = [1.0] * len(weights) if factors is None else factors
        row_scales_(backend, out, weights, lora_As or (), lora_Bs or (), scalings, factors)
        bump_versions(out)
    return out


def foreach_perturb_(
    weights: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    elementwise: bool = False,
    residuals: Sequence[Tensor] | None = None,
    row_offsets: Sequence[int] | None = None,
    col_offsets: Sequence[int] | None = None,
    checked: bool = False,
) -> None:
    """`perturb_` of every weight, bit for bit; shapes, dtypes and devices may differ.

    Nothing is written before everything is checked.

    Args:
        weights: see `perturb_`; written, one after the other where they overlap in memory.
        row_scales, keys: one of each for every weight.
        elementwise: for all of them.
        residuals: one for every weight, or None.
        row_offsets, col_offsets: one for every weight; None: 0.
        checked: that such lists passed before, as matrices of one device and backend: then only
            what guards memory is looked at, in a single call into the kernels, and what a residual
            refuses stands in it alone, see `check_residual`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb_`; lists of different lengths; residuals
            that share memory.
    """
    lists = weights, row_scales, keys, residuals, row_offsets, col_offsets
    _inplace("foreach_perturb_", checked, elementwise, *lists)


def foreach_restore_(
    weights: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    elementwise: bool = False,
    residuals: Sequence[Tensor] | None = None,
    row_offsets: Sequence[int] | None = None,
    col_offsets: Sequence[int] | None = None,
    checked: bool = False,
) -> None:
    """`restore_` of every weight, bit for bit. Arguments and errors: as `foreach_perturb_`.

    Weights that overlap in memory come back if they are given in the reverse order. Where
    residuals refuse chunks that changed, all other chunks of all weights are restored.
    """
    lists = weights, row_scales, keys, residuals, row_offsets, col_offsets
    _inplace("foreach_restore_", checked, elementwise, *lists)


def _inplace(
    op, checked, elementwise, weights, row_scales, keys, residuals, row_offsets, col_offsets
):
    count = len(weights) if checked else _count(op, weights)
    row_offsets = [0] * count if row_offsets is None else row_offsets
    col_offsets = [0] * count if col_offsets is None else col_offsets
    if checked:
        if weights:
            backend = _backend.resolve(weights[0].device.type, weights[0].dtype)
            lists = weights, row_scales, keys, residuals or (), row_offsets, col_offsets
            run_inplace(op.removeprefix("foreach_"), backend, elementwise, *lists)
            bump_versions(weights)
        return
    _check_list(op, Tensor, "row_scales", row_scales, count)
    _check_list(op, Tensor, "keys", keys, count)
    if residuals is not None:
        _check_list(op, Tensor, "residuals", residuals, count)
    _check_list(op, (int, torch.SymInt), "row_offsets", row_offsets, count)
    _check_list(op, (int, torch.SymInt), "col_offsets", col_offsets, count)
    _check.kinds(op, bool, elementwise=elementwise)
    getattr(torch.ops.flatkern, op)(
        [weight.detach() for weight in weights],
        row_scales,
        keys,
        elementwise=elementwise,
        residuals=residuals or [],
        row_offsets=row_offsets,
        col_offsets=col_offsets,
    )


def _count(op, weights):
    _check_list(op, Tensor, "weights", weights)
    return len(weights)


def _check_list(op, accepted, name, values, count=None):
    """A list or tuple of `count` values of an accepted type."""
    _check.kinds(op, (list, tuple), **{name: values})
    if count is not None and len(values) != count:
        raise ValueError(f"{op}: {name} must be as many as weights, {count}, got {len(values)}")
    for index, value in enumerate(values):
        if not isinstance(value, accepted) or isinstance(value, bool):
            _check.kinds(op, accepted, **{f"{name}[{index}]": value})


def _by_backend(tensors: Sequence[Tensor]) -> Iterator[tuple[str, list[int]]]:
    """The backends that serve the tensors, each with the indices of one device's, in order."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    groups: dict[tuple[torch.device, str], list[int]] = {}
    for (device, dtype), indices in kinds.items():
        backend = _backend.resolve(device.type, dtype)
        groups.setdefault((device, backend), []).extend(indices)
    for (_, backend), indices in groups.items():
        yield backend, sorted(indices)


def _check_row_norm(weights, lora_As, lora_Bs, scalings):
    for i, weight in enumerate(weights):
        op = f"foreach_row_norm: tensor {i}"
        shape = _check.weight(op, weight)
        adapters = (lora_As[i], lora_Bs[i]) if lora_As else (None, None)
        _check.adapters(op, *adapters, scalings[i], shape, weight.device)


def _select_row_norm(weights, lora_As, lora_Bs, scalings):
    norms = _fake_row_norm(weights, lora_As, lora_Bs, scalings)
    for backend, indices in _by_backend(weights):
        lists = norms, [as_matrix(weight) for weight in weights], lora_As, lora_Bs, scalings
        own = [[values[i] for i in indices] if values else [] for values in lists]
        row_scales_(backend, *own, [1.0] * len(indices))
    return norms


def _fake_row_norm(weights, lora_As, lora_Bs, scalings):
    _check_row_norm(weights, lora_As, lora_Bs, scalings)
    return [weight.new_empty((weight.shape[0],), dtype=torch.float32) for weight in weights]


implement("foreach_row_norm", _select_row_norm, _fake_row_norm)


def _define_inplace(op: str, single: str) -> None:
    """Selector and fake of `foreach_perturb_` or `foreach_restore_`, which differ in the kernel."""

    def fake(weights, row_scales, keys, *, elementwise, residuals, row_offsets, col_offsets):
        for i, weight in enumerate(weights):
            own = f"{op}: tensor {i}"
            where = {"row_offset": row_offsets[i], "col_offset": col_offsets[i]}
            check_values(own, weight, Noise(row_scales[i], keys[i], **where))
            if residuals:
                _residual.check(own, residuals[i], weight)

    def select(weights, row_scales, keys, *, elementwise, residuals, row_offsets, col_offsets):
        lists = weights, row_scales, keys, residuals, row_offsets, col_offsets
        fake(
            *lists[:3],
            elementwise=elementwise,
            residuals=residuals,
            row_offsets=row_offsets,
            col_offsets=col_offsets,
        )
        if residuals:
            _require_distinct(op, residuals)
            for i, residual in enumerate(residuals):
                _residual.check_place(f"{op}: tensor {i}", residual, weights[i])
        for backend, indices in _by_backend(weights):
            own = [[values[i] for i in indices] if values else [] for values in lists]
            _run(op, single, backend, elementwise, indices, *own)

    implement(op, select, fake)


def _run(op, single, backend, elementwise, indices, *lists):
    """All tensors are of one device and backend; `indices` are theirs in the call."""
    weights, residuals = lists[0], lists[3]
    matrices = [as_matrix(weight) for weight in weights]
    run_inplace(single, backend, elementwise, matrices, *lists[1:])
    headers = {}
    if residuals and not _residual.in_kernels(weights[0]):
        headers = dict(zip(indices, _residual.read_all(residuals), strict=True))
    for i, header in headers.items():
        _residual.raise_refused(f"{op}: tensor {i}", header)
    bump_versions([*weights, *residuals])
    for i, header in headers.items():
        _residual.raise_mismatched(f"{op}: tensor {i}", header)


def _require_distinct(op, residuals):
    """Refuse residuals that share memory: each holds one weight."""
    order = sorted(range(len(residuals)), key=lambda i: residuals[i].data_ptr())
    for i, j in pairwise(order):
        if residuals[i].data_ptr() + residuals[i].nbytes > residuals[j].data_ptr():
            first, second = sorted((i, j))
            raise ValueError(
                f"{op}: residuals must be one for every weight, got residuals[{second}] in the "
                f"memory of residuals[{first}]"
            )


_define_inplace("foreach_perturb_", "perturb_")
_define_inplace("foreach_restore_", "restore_")
