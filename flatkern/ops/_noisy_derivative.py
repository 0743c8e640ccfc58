"""The derivative of noisy_linear in Python; csrc/noisy_linear.cpp has the same for C++ kernels."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from flatkern import _backend
from flatkern.ops._autocast import autocast_off
from flatkern.ops._library import call
from flatkern.ops._noisy_linear import flat


def call_noisy_linear_backward(*arguments: Any, **options: Any) -> list[Tensor]:
    """`torch.ops.flatkern.noisy_linear_backward`, inside torch.func's transforms too."""
    return call("noisy_linear_backward", NoSecondDerivative, *arguments, **options)


def _refuse_forward_mode() -> NoReturn:
    raise RuntimeError(
        "noisy_linear: forward-mode derivatives are not supported; take them in reverse, "
        "or perturb the weight in place"
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what autograd's error means when backward comes too late."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        # The text of csrc/noisy_linear.cpp.
        raise RuntimeError(
            "noisy_linear: backward after the noise window of its forward was closed, or after "
            "something that it needs was written; call backward inside the window "
            f"({error})"
        ) from error


class Derivative(torch.autograd.Function):
    """Of noisy_linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(below: Any, options: dict[str, Any], *arguments: Any) -> Tensor:
        return below(*arguments, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, options, x, weight, bias, lora_A, lora_B, ctx.scaling, row_scale, key = inputs
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[2:7]
        # Only what a gradient that is asked for needs; the key, so that a late backward is noticed.
        x = x if need_weight or need_A or need_B else None
        adapters = (lora_A, lora_B) if need_x or need_A or need_B else (None, None)
        ctx.save_for_backward(x, weight, *adapters, row_scale, key)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = options
        # Backward must see the forward's noise, whatever is chosen by then.
        if options.get("backend") in (None, "auto"):
            backend = _backend.resolve(weight.device.type, weight.dtype)
            ctx.options = options | {"backend": backend}

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with explained():
            x, weight, lora_A, lora_B, row_scale, key = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[2:7]
        gradients = [None] * 5
        if need_x or need_A or need_B:
            adapted = lora_A, lora_B, ctx.scaling, row_scale, key
            arguments = grad, x, weight, *adapted, need_x, need_A, need_B
            found = iter(call_noisy_linear_backward(*arguments, **ctx.options))
            for index, need in ((0, need_x), (3, need_A), (4, need_B)):
                if need:
                    gradients[index] = next(found)
        if need_weight or need_bias:
            dtype = ctx.options.get("compute_dtype") or weight.dtype
            with autocast_off(grad.device.type):
                grad2 = flat(grad).to(dtype)
                if need_weight:
                    gradients[1] = (grad2.t() @ flat(x).to(dtype)).to(weight.dtype)
                if need_bias:
                    gradients[2] = grad2.sum(0).to(ctx.bias_dtype)
        return None, None, *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _refuse_forward_mode()


class NoSecondDerivative(torch.autograd.Function):
    """Of noisy_linear_backward: an error."""

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
