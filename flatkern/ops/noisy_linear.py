"""A linear layer under weight noise that never writes the weight.

The noisy weight is generated panel by panel into bounded scratch, and each panel goes through
the vendor's product. Backward regenerates the same noise, so nothing of size m x n is saved.
"""

import contextlib
from typing import Any, NoReturn

import torch
from torch import Tensor

from flatkern import _backend
from flatkern._noise import Noise
from flatkern.ops import _check
from flatkern.ops._library import call, define, differentiate, implement
from flatkern.ops._noisy_linear import Adapters, NoisyWeight, flat
from flatkern.ops.perturb import check_values

# Asked once: the compiler of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)

_OPTIONS = (
    "bool elementwise=False, int? scratch_bytes=None, SymInt row_offset=0, SymInt col_offset=0, "
    "ScalarType? compute_dtype=None, str? backend=None"
)
_ADAPTED = "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor row_scale, Tensor key"
define(
    "noisy_linear",
    f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTED}, *, {_OPTIONS}) -> Tensor",
    native=False,
)
define(
    "noisy_linear_backward",
    f"(Tensor grad, Tensor x, Tensor weight, {_ADAPTED}, bool need_x, bool need_A, bool need_B, "
    f"*, {_OPTIONS}) -> Tensor[]",
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
            default 32 MiB. With Triton few tokens need none: the product makes the noise.
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
    return call_noisy_linear(
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


def call_noisy_linear(*arguments: Any, **options: Any) -> Tensor:
    """`torch.ops.flatkern.noisy_linear`, inside torch.func's transforms too; nothing is checked."""
    return call("noisy_linear", _Derivative, *arguments, **options)


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


def _check_call(
    x,
    weight,
    bias,
    lora_A,
    lora_B,
    scaling,
    row_scale,
    key,
    *,
    scratch_bytes=None,
    row_offset=0,
    col_offset=0,
    **options,
):
    op = "noisy_linear"
    if weight.dim() != 2:
        _check.refuse(op, "weight", "2-D", weight)
    noise = Noise(row_scale, key, row_offset=row_offset, col_offset=col_offset)
    check_values(op, weight, noise)
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


def _noisy_weight(
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
    dtype = compute_dtype or weight.dtype
    offsets = row_offset, col_offset
    return NoisyWeight(weight, row_scale, key, dtype, backend, elementwise, scratch_bytes, *offsets)


def _adapters(lora_A, lora_B, scaling, *, compute_dtype=None, scratch_bytes=None, **options):
    return Adapters(lora_A, lora_B, scaling, compute_dtype or lora_A.dtype, scratch_bytes)


def _forward(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options):
    _check_call(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options)
    noisy = _noisy_weight(weight, row_scale, key, **options)
    with _autocast_off(x.device.type):
        x2 = flat(x)
        # Adapters take x as it came, unless autocast rounds it for them as well.
        base_x = x2.to(noisy.dtype)
        y = noisy.product(base_x, None if bias is None else bias.to(noisy.dtype))
        if lora_A is not None:
            branch_x = x2 if options.get("compute_dtype") is None else base_x
            _adapters(lora_A, lora_B, scaling, **options).add_product(y, branch_x)
    return _shaped(y.to(x.dtype), (*x.shape[:-1], weight.shape[0]))


def _fake_forward(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options):
    _check_call(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(
    grad, x, weight, lora_A, lora_B, scaling, row_scale, key, need_x, need_A, need_B, **options
):
    """The gradients that are needed, of x, lora_A and lora_B in this order."""
    noisy = _noisy_weight(weight, row_scale, key, **options)
    grad_x = grad_A = grad_B = None
    with _autocast_off(x.device.type):
        grad2, x2 = flat(grad), flat(x)
        base_grad = grad2.to(noisy.dtype)
        if need_x:
            grad_x = noisy.product_transposed(base_grad)
        if lora_A is not None:
            if options.get("compute_dtype") is not None:
                grad2, x2 = base_grad, x2.to(noisy.dtype)
            adapters = _adapters(lora_A, lora_B, scaling, **options)
            grad_A, grad_B = adapters.backward(grad2, x2, grad_x, need_A, need_B)
    gradients = (grad_x, x), (grad_A, lora_A), (grad_B, lora_B)
    return [_like(gradient, of) for gradient, of in gradients if gradient is not None]


def _like(result: Tensor, of: Tensor) -> Tensor:
    """`result`, of as many elements, with the dtype and shape of `of`."""
    return _shaped(result.to(of.dtype), of.shape)


def _shaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result of ours in another shape, not as a view: autograd lets nobody write those."""
    return result if result.dim() == len(shape) else torch.ops.aten._unsafe_view(result, shape)


def _fake_backward(
    grad, x, weight, lora_A, lora_B, scaling, row_scale, key, need_x, need_A, need_B, **options
):
    needed = (x, need_x), (lora_A, need_A), (lora_B, need_B)
    return [of.new_empty(of.shape) for of, need in needed if need]


implement("noisy_linear", _forward, _fake_forward)
implement("noisy_linear_backward", _backward, _fake_backward)


def _batched_forward(info, in_dims, *arguments, **options):
    """torch.vmap: one call where x alone is batched, else one for each example."""
    if all(dim is None for dim in in_dims[1:]):
        x, *others = arguments
        return torch.ops.flatkern.noisy_linear(x.movedim(in_dims[0], 0), *others, **options), 0
    return torch.stack([*_examples("noisy_linear", info, in_dims, arguments, options)]), 0


def _batched_backward(info, in_dims, *arguments, **options):
    results = _examples("noisy_linear_backward", info, in_dims, arguments, options)
    gradients = [torch.stack(each) for each in zip(*results, strict=True)]
    return gradients, [0] * len(gradients)


def _examples(op, info, in_dims, arguments, options):
    """The op's results for each example in turn."""
    for index in range(info.batch_size):
        here = (
            argument if dim is None else argument.select(dim, index)
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        yield getattr(torch.ops.flatkern, op)(*here, **options)


def _refuse_forward_mode() -> NoReturn:
    raise RuntimeError(
        "noisy_linear: forward-mode derivatives are not supported; take them in reverse, "
        "or perturb the weight in place"
    )


class _Derivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(below: Any, options: dict[str, Any], *arguments: Any) -> Tensor:
        return below(*arguments, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, options, x, weight, bias, lora_A, lora_B, ctx.scaling, row_scale, key = inputs
        ctx.save_for_backward(x, weight, lora_A, lora_B, row_scale, key)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = options
        # Backward must see the forward's noise, whatever is chosen by then.
        if options.get("backend") in (None, "auto"):
            backend = _backend.resolve(weight.device.type, weight.dtype)
            ctx.options = options | {"backend": backend}

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, row_scale, key = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[2:7]
        gradients = [None] * 5
        if need_x or need_A or need_B:
            adapted = lora_A, lora_B, ctx.scaling, row_scale, key
            arguments = grad, x, weight, *adapted, need_x, need_A, need_B
            found = iter(
                call("noisy_linear_backward", _NoSecondDerivative, *arguments, **ctx.options)
            )
            for index, need in ((0, need_x), (3, need_A), (4, need_B)):
                if need:
                    gradients[index] = next(found)
        if need_weight or need_bias:
            dtype = ctx.options.get("compute_dtype") or weight.dtype
            with _autocast_off(x.device.type):
                grad2 = flat(grad).to(dtype)
                if need_weight:
                    gradients[1] = (grad2.t() @ flat(x).to(dtype)).to(weight.dtype)
                if need_bias:
                    gradients[2] = grad2.sum(0).to(ctx.bias_dtype)
        return None, None, *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _refuse_forward_mode()


class _NoSecondDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(below: Any, options: dict[str, Any], *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(below(*arguments, **options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _refuse_forward_mode()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "noisy_linear: second derivatives are not supported; "
            "perturb the weight in place to take them"
        )


differentiate("noisy_linear", _Derivative)
differentiate("noisy_linear_backward", _NoSecondDerivative)
torch.library.register_vmap("flatkern::noisy_linear", _batched_forward)
torch.library.register_vmap("flatkern::noisy_linear_backward", _batched_backward)
