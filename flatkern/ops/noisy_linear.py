"""A linear layer under weight noise that never writes the weight.

The noisy weight is generated panel by panel into bounded scratch, and each panel goes through
the vendor's product. Backward regenerates the same noise, so nothing of size m x n is saved.
"""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from flatkern import _backend
from flatkern.ops import _check
from flatkern.ops._library import define, implement, kernel
from flatkern.ops.perturb import check_values

DEFAULT_SCRATCH_BYTES = 32 * 2**20
# Asked once: the compiler of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)

_OPTIONS = (
    "bool elementwise=False, int? scratch_bytes=None, SymInt row_offset=0, SymInt col_offset=0, "
    "ScalarType? compute_dtype=None, str? backend=None"
)
define(
    "noisy_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, "
    f"Tensor row_scale, Tensor key, *, {_OPTIONS}) -> Tensor",
    native=False,
)
define(
    "noisy_linear_grad_x",
    f"(Tensor grad, Tensor weight, Tensor row_scale, Tensor key, *, {_OPTIONS}) -> Tensor",
    native=False,
)


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    row_scale: Tensor,
    key: Tensor,
    *,
    elementwise: bool = False,
    scratch_bytes: int | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """y = x W_noisy^T + s (x A^T) B^T + b, with W_noisy = W + c_i z_ij generated on the fly.

    W_noisy is `perturb`'s result bit for bit. Under autocast the products are taken in autocast's
    dtype and the noise is added in the cast. Gradients flow to x, bias, lora_A, lora_B and, if it
    asks for one, weight (dW = dY^T x); row_scale and key are constants. Writing the weight, the
    key or the row scale between forward and backward makes backward raise.

    Args:
        x: [..., n].
        weight: [m, n] float32, bfloat16, float16 or float64 (reference).
        bias: [m] or None.
        lora_A, lora_B: [r, n] and [m, r], any floating dtype, or both None.
        scaling: s, finite.
        row_scale: c, float32 [m].
        key: int64 [4] on the weight's device.
        elementwise: e_ij = c_i z_ij |W_ij|.
        scratch_bytes: bound on the scratch for noisy panels (at least one row or column),
            default 32 MiB.
        row_offset, col_offset: global coordinates of the weight's first element.

    Returns:
        [..., m] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, layout or device.

    Equivalent eager code:

        noisy = perturb(weight, row_scale, key)
        y = F.linear(x, noisy, bias) + scaling * F.linear(F.linear(x, lora_A), lora_B)
    """
    op = "noisy_linear"
    _check.kinds(op, Tensor, x=x, weight=weight, row_scale=row_scale, key=key)
    _check.kinds(op, Tensor, optional=True, bias=bias, lora_A=lora_A, lora_B=lora_B)
    _check.kinds(op, (float, int), scaling=scaling)
    _check.kinds(op, bool, elementwise=elementwise)
    _check.kinds(op, int, optional=True, scratch_bytes=scratch_bytes)
    _check.kinds(op, (int, torch.SymInt), row_offset=row_offset, col_offset=col_offset)
    return torch.ops.flatkern.noisy_linear(
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        scaling,
        row_scale.detach(),
        key,
        elementwise=elementwise,
        scratch_bytes=scratch_bytes,
        row_offset=row_offset,
        col_offset=col_offset,
        # Read here, where torch.compile traces: a compiled graph runs with autocast off, and
        # forward and backward must take one backend even if the choice changes between them.
        compute_dtype=autocast_dtype(x),
        backend=_backend.named(),
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x enters a product, or None to leave it."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type not in _AUTOCAST_DEVICES:
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    """Products in the dtypes that they are given; costs nothing where autocast is off anyway."""
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check_values(
    x, weight, bias, lora_A, lora_B, scaling, row_scale, key, scratch_bytes, row_offset, col_offset
):
    op = "noisy_linear"
    if weight.dim() != 2:
        _check.refuse(op, "weight", "2-D", weight)
    check_values(op, weight, row_scale, key, row_offset, col_offset)
    rows, cols = weight.shape
    if x.dim() == 0 or x.shape[-1] != cols or x.dtype not in _check.FLOAT_DTYPES:
        _check.refuse(op, "x", f"floating [..., {cols}]", x)
    if x.device != weight.device:
        _check.refuse(op, "x", f"on the weight's device {weight.device}", x)
    if bias is not None:
        right = bias.shape == (rows,) and bias.device == weight.device
        if not right or bias.dtype not in _check.FLOAT_DTYPES:
            _check.refuse(op, "bias", f"floating [{rows}] on {weight.device} or None", bias)
    _check.adapters(op, lora_A, lora_B, scaling, (rows, cols), weight.device)
    if scratch_bytes is not None and scratch_bytes < 1:
        _check.refuse(op, "scratch_bytes", "at least 1 or None", scratch_bytes)


def _panels(length: int, bytes_each: int, scratch_bytes: int | None) -> list[tuple[int, int]]:
    """Cut `length` rows (or columns) of `bytes_each` into ranges that fit the scratch."""
    fit = (scratch_bytes or DEFAULT_SCRATCH_BYTES) // max(bytes_each, 1)
    if fit >= length:
        return [(0, length)]
    # Whole cache lines and vector registers, where that many fit.
    step = fit // 64 * 64 if fit >= 64 else max(fit, 1)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] as [tokens, n]; the sizes are spelled out because n may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)


def _forward(
    x,
    weight,
    bias,
    lora_A,
    lora_B,
    scaling,
    row_scale,
    key,
    *,
    elementwise=False,
    scratch_bytes=None,
    row_offset=0,
    col_offset=0,
    compute_dtype=None,
    backend=None,
):
    _check_values(
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        scaling,
        row_scale,
        key,
        scratch_bytes,
        row_offset,
        col_offset,
    )
    dtype = compute_dtype or weight.dtype
    perturb_out = kernel("perturb_out", weight, backend)
    panels = _panels(weight.shape[0], weight.shape[1] * dtype.itemsize, scratch_bytes)
    bias = None if bias is None else bias.to(dtype)
    with _autocast_off(x.device.type):
        x2 = _flat(x, dtype)
        scratch = torch.empty((panels[0][1], weight.shape[1]), dtype=dtype, device=weight.device)
        y = None
        if len(panels) > 1:
            y = torch.empty((x2.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
        for begin, end in panels:
            noisy = scratch[: end - begin]
            perturb_out(
                weight[begin:end],
                row_scale[begin:end],
                key,
                elementwise=elementwise,
                row_offset=row_offset + begin,
                col_offset=col_offset,
                out=noisy,
            )
            part = F.linear(x2, noisy, None if bias is None else bias[begin:end])
            if y is None:
                y = part
            else:
                y[:, begin:end] = part
        if lora_A is not None:
            branch_x = x2 if compute_dtype else _flat(x, lora_A.dtype)
            y = y + _branch(branch_x, lora_A, lora_B) * scaling
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _branch(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))


def _fake_forward(
    x, weight, bias, lora_A, lora_B, scaling, row_scale, key, *, scratch_bytes=None, **options
):
    offsets = options.get("row_offset", 0), options.get("col_offset", 0)
    _check_values(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, scratch_bytes, *offsets)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _grad_x(
    grad,
    weight,
    row_scale,
    key,
    *,
    elementwise=False,
    scratch_bytes=None,
    row_offset=0,
    col_offset=0,
    compute_dtype=None,
    backend=None,
):
    """grad [tokens, m] times W_noisy. Column panels: no reduction is split or accumulated."""
    dtype = compute_dtype or weight.dtype
    perturb_out = kernel("perturb_out", weight, backend)
    rows, cols = weight.shape
    panels = _panels(cols, rows * dtype.itemsize, scratch_bytes)
    with _autocast_off(grad.device.type):
        grad = grad.to(dtype)
        scratch = torch.empty(rows * panels[0][1], dtype=dtype, device=weight.device)
        grad_x = None
        if len(panels) > 1:
            grad_x = torch.empty((grad.shape[0], cols), dtype=dtype, device=grad.device)
        for begin, end in panels:
            noisy = scratch[: rows * (end - begin)].view(rows, end - begin)
            perturb_out(
                weight[:, begin:end],
                row_scale,
                key,
                elementwise=elementwise,
                row_offset=row_offset,
                col_offset=col_offset + begin,
                out=noisy,
            )
            part = grad @ noisy
            if grad_x is None:
                grad_x = part
            else:
                grad_x[:, begin:end] = part
    return grad_x


def _fake_grad_x(grad, weight, row_scale, key, *, compute_dtype=None, **options):
    return grad.new_empty((grad.shape[0], weight.shape[1]), dtype=compute_dtype or weight.dtype)


implement("noisy_linear", _forward, _fake_forward)
implement("noisy_linear_grad_x", _grad_x, _fake_grad_x)


def _save(ctx, inputs, keyword_only_inputs, output):
    x, weight, bias, lora_A, lora_B, ctx.scaling, row_scale, key = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, row_scale, key)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = dict(keyword_only_inputs)
    # Backward must see the forward's noise, whatever is chosen by then.
    if ctx.options["backend"] in (None, "auto"):
        ctx.options["backend"] = _backend.resolve(weight.device.type, weight.dtype)


def _backward(ctx, grad):
    x, weight, lora_A, lora_B, row_scale, key = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    compute_dtype = ctx.options["compute_dtype"]
    grad_x = grad_weight = grad_bias = grad_A = grad_B = None
    with _autocast_off(x.device.type):
        grad2 = _flat(grad, compute_dtype or weight.dtype)
        if need_x:
            grad_x = torch.ops.flatkern.noisy_linear_grad_x(
                grad2, weight, row_scale, key, **ctx.options
            )
        if need_weight:
            grad_weight = (grad2.t() @ _flat(x, grad2.dtype)).to(weight.dtype)
        if need_bias:
            grad_bias = grad2.sum(0).to(ctx.bias_dtype)
        if lora_A is not None and (need_x or need_A or need_B):
            branch_dtype = compute_dtype or lora_A.dtype
            scaled = _flat(grad, branch_dtype) * ctx.scaling
            x2 = _flat(x, branch_dtype)
            down = scaled @ lora_B.to(branch_dtype)
            if need_x:
                grad_x = grad_x + down @ lora_A.to(branch_dtype)
            if need_A:
                grad_A = (down.t() @ x2).to(lora_A.dtype)
            if need_B:
                up = F.linear(x2, lora_A.to(branch_dtype))
                grad_B = (scaled.t() @ up).to(lora_B.dtype)
        if need_x:
            grad_x = grad_x.to(x.dtype).view(x.shape)
    return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _no_second_backward(ctx, grad):
    raise RuntimeError(
        "noisy_linear: second derivatives are not supported; "
        "perturb the weight in place to take them"
    )


torch.library.register_autograd("flatkern::noisy_linear", _backward, setup_context=_save)
torch.library.register_autograd("flatkern::noisy_linear_grad_x", _no_second_backward)
