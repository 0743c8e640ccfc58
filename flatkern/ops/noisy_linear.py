"""A linear layer under weight noise that never writes the weight.

The noisy weight is generated panel by panel into bounded scratch, and each panel goes through
the vendor's product. Backward regenerates the same noise, so nothing of size m x n is saved.
"""

import torch
from torch import Tensor

from flatkern import _backend
from flatkern._noise import Noise
from flatkern.ops import _check
from flatkern.ops._autocast import autocast_dtype, autocast_off
from flatkern.ops._library import NATIVE_NAMESPACES, call, define, differentiate, implement, native
from flatkern.ops._noisy_derivative import Derivative, NoSecondDerivative
from flatkern.ops._noisy_linear import Adapters, NoisyWeight, flat, scratch_of
from flatkern.ops.perturb import check_values

_OPTIONS = (
    "bool elementwise=False, int? scratch_bytes=None, SymInt row_offset=0, SymInt col_offset=0, "
    "ScalarType? compute_dtype=None, str? backend=None"
)
# The C++ kernels take everything in its place, and sizes instead of a bound on the scratch.
_NATIVE_OPTIONS = (
    "bool elementwise, ScalarType? compute_dtype, int panel_bytes, int block_bytes, "
    "int row_offset, int col_offset"
)
_ADAPTED = "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor row_scale, Tensor key"
_FORWARD = f"Tensor x, Tensor weight, Tensor? bias, {_ADAPTED}"
_BACKWARD = (
    f"Tensor grad, Tensor? x, Tensor weight, {_ADAPTED}, bool need_x, bool need_A, bool need_B"
)
define(
    "noisy_linear",
    f"({_FORWARD}, *, {_OPTIONS}) -> Tensor",
    native=f"({_FORWARD}, {_NATIVE_OPTIONS}) -> Tensor",
)
define(
    "noisy_linear_backward",
    f"({_BACKWARD}, *, {_OPTIONS}) -> Tensor[]",
    native=f"({_BACKWARD}, {_NATIVE_OPTIONS}) -> Tensor[]",
)

# By backend, what layers call in place of the op where C++ serves their weight: without the
# parsing of a schema, and autocast's dtype is asked for there.
NATIVE_LAYERS = {
    name: getattr(_backend._C, f"noisy_layer_{name}")
    for name in ("cpu", "cuda")
    if hasattr(_backend._C, f"noisy_layer_{name}")
}


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
        scratch_bytes: bound on a panel of noisy weight (at least one row or column), and on what
            the low-rank part takes for a block of tokens. Default: 32 MiB of each; on a GPU panels
            of 128 MiB and blocks of 1 GiB, beyond what layers of 7B models need.
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
    noise = Noise(row_scale.detach(), key, elementwise, row_offset, col_offset)
    return call_noisy_linear(
        *(x, weight, bias, lora_A, lora_B, scaling, noise),
        scratch_bytes=scratch_bytes,
        # Read here, where torch.compile traces: a compiled graph runs with autocast off, and
        # forward and backward must take one backend even if the choice changes between them.
        compute_dtype=autocast_dtype(x),
        backend=_backend.named(),
    )


def call_noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    noise: Noise,
    *,
    scratch_bytes: int | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`torch.ops.flatkern.noisy_linear`, inside torch.func's transforms too; nothing is checked.

    Where C++ serves the weight it is one node in autograd's graph (csrc/noisy_linear.cpp). It
    cannot be transformed, and compilers see the op above it.
    """
    # Unpacked: a compiler that traces this need not know the value's properties.
    row_scale, key, elementwise, row_offset, col_offset = noise
    operands = x, weight, bias, lora_A, lora_B, scaling, row_scale, key
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        run = native("noisy_linear", weight, backend)
        if run is not None:
            _check_scratch(scratch_bytes)
            sizes = scratch_of(weight.device.type, scratch_bytes)
            return run(*operands, elementwise, compute_dtype, *sizes, row_offset, col_offset)
    return call(
        "noisy_linear",
        Derivative,
        *operands,
        elementwise=elementwise,
        scratch_bytes=scratch_bytes,
        row_offset=row_offset,
        col_offset=col_offset,
        compute_dtype=compute_dtype,
        backend=backend,
    )


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
    _check_scratch(scratch_bytes)


def _check_scratch(scratch_bytes):
    if scratch_bytes is not None and scratch_bytes < 1:
        _check.refuse("noisy_linear", "scratch_bytes", "at least 1 or None", scratch_bytes)


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
    noise = Noise(row_scale, key, elementwise, row_offset, col_offset)
    panel_bytes, _ = scratch_of(weight.device.type, scratch_bytes)
    return NoisyWeight(weight, noise, compute_dtype or weight.dtype, backend, panel_bytes)


def _adapters(lora_A, lora_B, scaling, *, compute_dtype=None, scratch_bytes=None, **options):
    _, block_bytes = scratch_of(lora_A.device.type, scratch_bytes)
    return Adapters(lora_A, lora_B, scaling, compute_dtype or lora_A.dtype, block_bytes)


def _native_options(
    device_type,
    *,
    elementwise=False,
    scratch_bytes=None,
    row_offset=0,
    col_offset=0,
    compute_dtype=None,
    backend=None,
):
    sizes = scratch_of(device_type, scratch_bytes)
    return elementwise, compute_dtype, *sizes, row_offset, col_offset


def _forward(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options):
    run = native("noisy_linear", weight, options.get("backend"))
    if run is not None:
        _check_scratch(options.get("scratch_bytes"))
        operands = x, weight, bias, lora_A, lora_B, scaling, row_scale, key
        return run(*operands, *_native_options(weight.device.type, **options))
    _check_call(x, weight, bias, lora_A, lora_B, scaling, row_scale, key, **options)
    noisy = _noisy_weight(weight, row_scale, key, **options)
    with autocast_off(x.device.type):
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
    """The gradients that are needed, of x, lora_A and lora_B in this order.

    x is not looked at, and may be None, where lora_A and lora_B need none.
    """
    run = native("noisy_linear_backward", weight, options.get("backend"))
    if run is not None:
        operands = grad, x, weight, lora_A, lora_B, scaling, row_scale, key
        needs = need_x, need_A, need_B
        return run(*operands, *needs, *_native_options(weight.device.type, **options))
    noisy = _noisy_weight(weight, row_scale, key, **options)
    found = []
    grad_x = None
    with autocast_off(grad.device.type):
        grad2 = flat(grad)
        base_grad = grad2.to(noisy.dtype)
        x2 = flat(x) if need_A or need_B else None
        if need_x:
            grad_x = noisy.product_transposed(base_grad)
        if lora_A is not None:
            if options.get("compute_dtype") is not None:
                grad2, x2 = base_grad, None if x2 is None else x2.to(noisy.dtype)
            adapters = _adapters(lora_A, lora_B, scaling, **options)
            gradients = adapters.backward(grad2, x2, grad_x, need_A, need_B)
            pairs = zip(gradients, (lora_A, lora_B), strict=True)
            found = [gradient.to(of.dtype) for gradient, of in pairs if gradient is not None]
    if need_x:
        found.insert(0, _shaped(grad_x.to(grad.dtype), (*grad.shape[:-1], weight.shape[1])))
    return found


def _shaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result of ours in another shape, not as a view: autograd lets nobody write those."""
    return result if result.dim() == len(shape) else torch.ops.aten._unsafe_view(result, shape)


def _fake_backward(
    grad, x, weight, lora_A, lora_B, scaling, row_scale, key, need_x, need_A, need_B, **options
):
    found = [grad.new_empty((*grad.shape[:-1], weight.shape[1]))] if need_x else []
    needed = (lora_A, need_A), (lora_B, need_B)
    return found + [of.new_empty(of.shape) for of, need in needed if need]


implement("noisy_linear", _forward, _fake_forward)
implement("noisy_linear_backward", _backward, _fake_backward)


def _fake_native_forward(*arguments):
    operands, (_, _, _, _, row_offset, col_offset) = arguments[:8], arguments[8:]
    return _fake_forward(*operands, row_offset=row_offset, col_offset=col_offset)


def _fake_native_backward(*arguments):
    return _fake_backward(*arguments[:11])


for _namespace in NATIVE_NAMESPACES:
    torch.library.register_fake(f"{_namespace}::noisy_linear", _fake_native_forward)
    torch.library.register_fake(f"{_namespace}::noisy_linear_backward", _fake_native_backward)


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


differentiate("noisy_linear", Derivative)
for _namespace in ("flatkern", *NATIVE_NAMESPACES):
    differentiate("noisy_linear_backward", NoSecondDerivative, _namespace)
torch.library.register_vmap("flatkern::noisy_linear", _batched_forward)
torch.library.register_vmap("flatkern::noisy_linear_backward", _batched_backward)
