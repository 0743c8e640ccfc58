"""LoRA-GA: adapters that start along the gradient of full fine-tuning."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.calibration import evaluating, idle_layers
from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check

_OP = "lora_ga_init"


def lora_ga_init(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    gamma: float = 16.0,
) -> None:
    """A0 = t V_1..r^T, B0 = t U_r+1..2r, t = m^(1/4) / gamma^(1/2), over the base W - s B0 A0.

    U S V^T is the SVD of the mean gradient of the loss with respect to W [m, n]. The merged weight
    is W as before, up to the rounding of the base to W's dtype. The base is a new parameter: the
    tensor that was there, which others may hold, is not written. Source: Wang et al., "LoRA-GA",
    2024, and its code (direction ArB2r, scale stable; PEFT scales B by S and A not at all).

    The model runs in evaluation mode; no `.grad` is touched. On an error, Ctrl-C included,
    everything is as it was. Memory until it returns: a float32 gradient and a copy of every
    adapted weight.

    Args:
        model: with fresh `LoRALinear` layers (B = 0) and no window open on them.
        loss_fn: takes one of `batches`, returns its mean loss, a scalar tensor.
        batches: at least one.
        gamma: finite and above 0; 16 in the paper.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, a layer of another kind or
            not fresh, 2 r above the sizes of a weight, no batches, a layer that the loss does not
            depend on, a gradient that is not finite or zero.
        RuntimeError: a layer is merged or in a noise window.
    """
    layers = idle_layers(_OP, model)
    _check.kinds(_OP, Callable, loss_fn=loss_fn)
    _check.kinds(_OP, Iterable, batches=batches)
    _check.kinds(_OP, (float, int), gamma=gamma)
    _check.finite(_OP, "gamma", gamma, minimum=0.0)
    if gamma == 0:
        _check.refuse(_OP, "gamma", "above 0", gamma)
    for name, layer in layers.items():
        _check_fresh(name, layer)
    gradients = _summed_gradients(model, layers, loss_fn, batches)
    starts = {}
    for name, layer in layers.items():
        factors = _start(layer, gradients.pop(name), gamma)
        starts[name] = (*factors, layer.offset_weight(*factors))
    before = {name: (layer.weight, layer.lora_A.detach().clone()) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.rebase(*starts[name])
    except BaseException:
        for name, layer in layers.items():
            _undo(layer, *before[name])
        raise


def _check_fresh(name: str, layer: LoRALinear) -> None:
    if layer.products is not None:
        kind = type(layer).__name__
        raise ValueError(f"{_OP}: {name} must be a LoRALinear or DoRALinear, got {kind}")
    if layer.offset_A is not None or layer.lora_B.any():
        raise ValueError(f"{_OP}: {name} must be fresh, with lora_B = 0, got one that is not")
    if 2 * layer.r > min(layer.weight.shape):
        _check.refuse(_OP, f"{name}.r", f"at most {min(layer.weight.shape) // 2}", layer.r)


def _summed_gradients(
    model: nn.Module,
    layers: dict[str, LoRALinear],
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
) -> dict[str, Tensor]:
    """Float32 or wider; the sum has the mean's singular vectors, and nothing else is used."""
    weights = {name: layer.weight for name, layer in layers.items()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    total: dict[str, Tensor] = {}
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad(), evaluating(model):
            for batch in batches:
                loss = loss_fn(batch)
                _check.kinds(_OP, Tensor, loss=loss)
                if loss.dim() != 0 or not loss.requires_grad:
                    _check.refuse(_OP, "loss", "a scalar that depends on the model", loss)
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        wide = torch.promote_types(gradient.dtype, torch.float32)
                        total[name] = total.get(name, 0) + gradient.to(wide)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if not total:
        raise ValueError(f"{_OP}: batches must run the LoRALinear layers, got none that does")
    for name in layers:
        size = total[name].norm() if name in total else torch.zeros(())
        if not (torch.isfinite(size) and size > 0):
            raise ValueError(
                f"{_OP}: the loss must depend on every layer, with a finite gradient, got one of "
                f"norm {size:g} for {name}"
            )
    return total


def _start(layer: LoRALinear, gradient: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    size = layer.out_features**0.25 / gamma**0.5
    r = layer.r
    # In the dtype of the parameters: the offset must be theirs.
    return (vh[:r] * size).to(layer.lora_A.dtype), (u[:, r : 2 * r] * size).to(layer.lora_B.dtype)


@torch.no_grad()
def _undo(layer: LoRALinear, weight: nn.Parameter, lora_A: Tensor) -> None:
    layer.weight = weight
    layer.lora_A.copy_(lora_A)
    layer.lora_B.zero_()
    layer.offset_A = layer.offset_B = None
