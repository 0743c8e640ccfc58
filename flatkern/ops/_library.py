"""Definition and selection: one schema per op, one selector, four implementations.

`define` gives a schema to `flatkern::op`, where Python selects, and to `flatkern_cpu::op` and
`flatkern_cuda::op`, for which `flatkern._C` registers kernels. Two implementations under one
dispatch key would silently replace each other; separate namespaces cannot.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flatkern import _backend, reference

NATIVE_NAMESPACES = ("flatkern_cpu", "flatkern_cuda")
# A registration lives as long as its library.
_AUTOGRAD = {
    namespace: torch.library.Library(namespace, "IMPL")
    for namespace in ("flatkern", *NATIVE_NAMESPACES)
}


def define(name: str, schema: str, *, native: bool | str = True, public: bool = True) -> None:
    """Define `flatkern::name` if `public`, and its kernels' schema: the same, their own or none."""
    schemas = {"flatkern": schema} if public else {}
    if native:
        schemas |= dict.fromkeys(NATIVE_NAMESPACES, schema if native is True else native)
    for namespace, own in schemas.items():
        torch.library.define(f"{namespace}::{name}", own, tags=torch.Tag.pt2_compliant_tag)


def implement(name: str, select: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the selector of `flatkern::name` and what it does on fake tensors."""
    torch.library.impl(f"flatkern::{name}", "CompositeExplicitAutograd", select)
    torch.library.register_fake(f"flatkern::{name}", fake)


def differentiate(
    name: str, function: type[torch.autograd.Function], namespace: str = "flatkern"
) -> None:
    """Register `function` as the derivative of `namespace::name`.

    It is applied to (below, options, *arguments), with the keyword arguments that differ from their
    defaults in `options`, and its forward returns `below(*arguments, **options)`: the op itself.
    Like `torch.library.register_autograd`, but skips its inspection of the schema on each call,
    and sees forward-mode tangents instead of silently dropping them.
    """
    op = getattr(getattr(torch.ops, namespace), name).default

    class Applied(function):
        # With a setup_context of its own, each application would inspect forward's signature.
        setup_context = staticmethod(torch.autograd.Function.setup_context)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

    def run(keyset: Any, *arguments: Any, **options: Any) -> Any:
        below = functools.partial(_below_autograd, op, keyset)
        reverse = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if reverse or forward_ad._current_level >= 0:
            return Applied.apply(below, options, *arguments)
        return below(*arguments, **options)

    _AUTOGRAD[namespace].impl(name, run, "Autograd", with_keyset=True)


def call(
    name: str, function: type[torch.autograd.Function], *arguments: Any, **options: Any
) -> Any:
    """Call `flatkern::name`, whose derivative is `function`, inside torch.func's transforms too.

    They transform functions, and do not find the one that is applied below the dispatcher.
    """
    op = getattr(torch.ops.flatkern, name)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return function.apply(op, options, *arguments)
    return op(*arguments, **options)


def _below_autograd(op: Any, keyset: Any, *arguments: Any, **options: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **options)


def kernel(op: str, tensor: Tensor, backend: str | None = None) -> Callable[..., Any]:
    """The implementation of `op` that serves `tensor`'s device and dtype.

    `op` is a plain function name, as in `flatkern.reference`; `perturb_out` is `perturb.out`.
    """
    # Keys and other integer tensors stand for float32 results.
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    name = _backend.resolve(tensor.device.type, dtype, backend)
    if name == "reference":
        return getattr(reference, op)
    if name == "triton":
        return getattr(importlib.import_module("flatkern.triton"), op)
    namespace = getattr(torch.ops, f"flatkern_{name}")
    if op == "perturb_out":
        return namespace.perturb.out
    return getattr(namespace, op).default


def native(op: str, weight: Tensor, backend: str | None) -> Callable[..., Any] | None:
    """The C++ kernel of `op` that serves `weight`, or None where another implementation does."""
    if backend is None or backend == "auto":
        if weight.dtype not in _backend.KERNEL_DTYPES:
            return None
        backend = _backend.resolve(weight.device.type, weight.dtype, backend)
    return _native(op, backend) if backend == weight.device.type else None


@functools.cache
def _native(op: str, backend: str) -> Callable[..., Any] | None:
    if f"flatkern_{backend}" not in NATIVE_NAMESPACES or _backend._why_unusable(backend):
        return None
    return getattr(getattr(torch.ops, f"flatkern_{backend}"), op).default


def as_matrix(weight: Tensor) -> Tensor:
    """A weight of any shape as dim0 x rest, without a copy (checked before)."""
    if weight.dim() == 2:
        return weight
    return weight.view(weight.shape[0], -1) if weight.numel() else weight.view(weight.shape[0], 0)


def bump_version(tensor: Tensor) -> None:
    """Tell autograd that `tensor` was written: kernels write behind its back."""
    bump_versions([tensor])


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """`bump_version` of each."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
