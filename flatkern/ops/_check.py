"""Argument checks, shared by the selectors and the fake implementations.

Every message names the op and the argument, what it was, and what is accepted.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ROWS = 2**32
MAX_COLS = 2**34


def describe(value: Any) -> str:
    """A tensor as dtype, shape and device; anything else as it prints."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def refuse(op: str, argument: str, accepted: str, value: Any) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {accepted}, got {describe(value)}")


def kinds(
    op: str, accepted: type | tuple[type, ...], optional: bool = False, **values: Any
) -> None:
    """TypeError unless every named value is of an accepted type (or None, if optional)."""
    for argument, value in values.items():
        if value is None and optional:
            continue
        wrong_bool = isinstance(value, bool) and accepted is not bool
        if isinstance(value, accepted) and not wrong_bool:
            continue
        types = accepted if isinstance(accepted, tuple) else (accepted,)
        names = " or ".join(t.__name__ for t in types) + (" or None" if optional else "")
        hint = ", whose .to(device) is one" if hasattr(value, "to") and Tensor in types else ""
        raise TypeError(f"{op}: {argument} must be {names}, got {type(value).__name__}{hint}")


def weight(op: str, value: Tensor, argument: str = "weight") -> tuple[int, int]:
    """Check a weight's dtype and layout; return its matrix shape (dim0, rest)."""
    if value.dtype not in FLOAT_DTYPES:
        refuse(op, argument, "float32, bfloat16, float16 or float64", value)
    if value.dim() == 0:
        refuse(op, argument, "at least 1-D", value)
    if value.dim() != 2:
        if not value.is_contiguous():
            raise ValueError(
                f"{op}: {argument} must be contiguous unless it is 2-D, got {describe(value)} "
                f"with strides {list(value.stride())}"
            )
        rows = value.shape[0]
        return rows, (value.numel() // rows if rows else 0)
    rows, cols = value.shape
    unit_columns = cols <= 1 or value.stride(1) == 1
    apart = rows <= 1 or value.stride(0) >= cols
    if not (unit_columns and apart):
        raise ValueError(
            f"{op}: {argument} must have unit column stride and rows that do not overlap, "
            f"got {describe(value)} with strides {list(value.stride())}"
        )
    return rows, cols


def offsets(op: str, rows: int, cols: int, row_offset: int, col_offset: int) -> None:
    """Global coordinates must fit the counter: rows < 2^32, columns < 2^34."""
    for name, size, offset_name, offset, limit in (
        ("rows", rows, "row_offset", row_offset, MAX_ROWS),
        ("cols", cols, "col_offset", col_offset, MAX_COLS),
    ):
        if size < 0:
            refuse(op, name, "at least 0", size)
        if offset < 0:
            refuse(op, offset_name, "at least 0", offset)
        if size + offset > limit:
            raise ValueError(
                f"{op}: {offset_name} + {name} must be at most {limit}, got {offset} + {size}"
            )


def key(op: str, value: Tensor, like: Tensor | None = None) -> None:
    if value.dtype != torch.int64 or value.shape != (4,):
        refuse(op, "key", "int64 [4], as NoiseKey(...).to(device) makes it", value)
    if like is not None and value.device != like.device:
        refuse(op, "key", f"on the weight's device {like.device}", value)


def row_scale(op: str, value: Tensor, rows: int, like: Tensor, argument: str = "row_scale") -> None:
    right = value.dtype == torch.float32 and value.shape == (rows,) and value.device == like.device
    if not right or (rows > 1 and value.stride(0) != 1):
        accepted = f"contiguous float32 [{rows}] on {like.device}"
        refuse(op, argument, accepted, value)


def adapters(
    op: str,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    """lora_A [r, n] and lora_B [m, r], both or neither; any floating dtype; finite scaling."""
    finite(op, "scaling", scaling)
    if lora_A is None and lora_B is None:
        return
    if lora_A is None or lora_B is None:
        missing, given = ("lora_A", "lora_B") if lora_A is None else ("lora_B", "lora_A")
        raise ValueError(f"{op}: {missing} must be given together with {given}, got None")
    rows, cols = shape
    if lora_A.dtype not in FLOAT_DTYPES or lora_A.dim() != 2 or lora_A.shape[1] != cols:
        refuse(op, "lora_A", f"floating [r, {cols}]", lora_A)
    rank = lora_A.shape[0]
    if lora_B.dtype not in FLOAT_DTYPES or lora_B.shape != (rows, rank):
        refuse(op, "lora_B", f"floating [{rows}, {rank}]", lora_B)
    for argument, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        if value.device != device:
            refuse(op, argument, f"on the weight's device {device}", value)


def no_overlap(op: str, out: Tensor, weight: Tensor) -> None:
    """`out` is `weight`, or shares no element with it; not for fake tensors, which lie nowhere.

    Both have passed `weight()`. Where only the rows' address ranges interleave, as those of
    columns of one matrix do, equal row strides are enough to tell.
    """
    if out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return
    if not out.numel() or (out.data_ptr() == weight.data_ptr() and out.stride() == weight.stride()):
        return
    begin, width, stride = _extent(weight)
    out_begin, out_width, out_stride = _extent(out)
    rows = weight.shape[0] - 1
    if (
        begin + rows * stride + width <= out_begin
        or out_begin + rows * out_stride + out_width <= begin
    ):
        return
    shift = (out_begin - begin) % stride
    if stride == out_stride and width <= shift and shift + out_width <= stride:
        return
    raise ValueError(
        f"{op}: out must be weight or share no memory with it, got {describe(out)} that overlaps it"
    )


def _extent(matrix: Tensor) -> tuple[int, int, int]:
    """First byte, bytes of a row, bytes from row to row."""
    size = matrix.element_size()
    rows = matrix.shape[0]
    width = matrix.numel() // rows * size
    return matrix.data_ptr(), width, max(matrix.stride(0) * size, width) if rows > 1 else width


def finite(op: str, argument: str, value: float, minimum: float | None = None) -> None:
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        accepted = "finite" if minimum is None else f"finite and at least {minimum:g}"
        refuse(op, argument, accepted, value)


def one_of(op: str, accepted: tuple[str, ...], **values: str) -> None:
    """TypeError or ValueError unless every named value is an accepted string."""
    for argument, value in values.items():
        kinds(op, str, **{argument: value})
        if value not in accepted:
            refuse(op, argument, " or ".join(map(repr, accepted)), value)
