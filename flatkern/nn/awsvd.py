"""AwSVD: NoRA's outer factors from the weight and the activations that it meets."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.calibration import evaluating, idle_layers
from flatkern.nn.factors import singular_factors
from flatkern.nn.nora import NoRALinear
from flatkern.ops import _check

_OP = "awsvd_init"
_DIAGONALS = ("l2", "mean_abs_sqrt", "direction")


def awsvd_init(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    diagonal: str = "l2",
    floor: float = 1e-6,
) -> None:
    """Fill the outer factors of every `NoRALinear`: B = U_r S_r, A = V_r^T D^-1, W D = U S V^T.

    D is diagonal, one number per input feature from the layer's inputs X, all tokens of all
    batches together: the columns that carry more are approximated better. Of all matrices of
    rank r, B A has the smallest ||(W - B A) D||_F, the root of the sum of S_k^2 over k > r, and
    the spectral norm of W - B A is at most S_(r+1) / min D. Source: "NoRA", 2024.

    The model runs in evaluation mode, without gradients and without its NoRA adapters; afterwards
    it is as before, also after an exception, but for A and B. The inner factors stay: with B' = 0
    the layers still start at W.

    Args:
        model: with `NoRALinear` layers, or one; idle: not merged, no window open.
        batches: each one is the model's argument; a mapping is its keywords, a tuple or list its
            positional arguments. None: D = 1, the plain SVD.
        diagonal: "l2" (||X_:j||_2), "mean_abs_sqrt" (the root of mean |X_:j|, as in the published
            code) or "direction" (||X_:j||_2 of tokens scaled to length 1: each counts the same, so
            a few of enormous length, which large models have, decide nothing; the diagonal of the
            spatial sign covariance, Visuri et al., 2000).
        floor: D_jj is at least floor times the largest, in (0, 1]: an input that was always zero
            must not divide by zero.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, r above the sizes of a
            weight, no batches, a layer that no batch reaches, or that meets zeros only or
            activations that are not finite.
        RuntimeError: a layer is merged or in a noise window.
    """
    layers = idle_layers(_OP, model, NoRALinear)
    _check.kinds(_OP, Iterable, optional=True, batches=batches)
    _check.kinds(_OP, str, diagonal=diagonal)
    _check.kinds(_OP, (float, int), floor=floor)
    if diagonal not in _DIAGONALS:
        _check.refuse(_OP, "diagonal", " or ".join(map(repr, _DIAGONALS)), diagonal)
    if not 0 < floor <= 1:
        _check.refuse(_OP, "floor", "in (0, 1]", floor)
    for name, layer in layers.items():
        if layer.r > min(layer.weight.shape):
            _check.refuse(_OP, f"{name}.r", f"at most {min(layer.weight.shape)}", layer.r)
    diagonals = dict.fromkeys(layers)
    if batches is not None:
        powers = _column_powers(model, layers, batches, diagonal)
        diagonals = {
            name: _diagonal(name, *powers.get(name, (None, 0)), diagonal, floor) for name in layers
        }
    outer = {
        name: singular_factors(layer.weight.to(layer.lora_A.dtype), layer.r, diagonals[name])
        for name, layer in layers.items()
    }
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(outer[name][0])
            layer.lora_B.copy_(outer[name][1])


def _column_powers(
    model: nn.Module, layers: dict[str, NoRALinear], batches: Iterable[Any], diagonal: str
) -> dict[str, tuple[Tensor, int]]:
    """Per layer the sum of |X_tj|^power over all tokens t, and how many there were."""
    power = 1 if diagonal == "mean_abs_sqrt" else 2
    sums: dict[str, tuple[Tensor, int]] = {}

    def record(name: str, x: Tensor) -> None:
        tokens = x.detach().reshape(-1, x.shape[-1])
        if diagonal == "direction":
            tokens = nn.functional.normalize(tokens.double(), dim=1)
        norms = torch.linalg.vector_norm(tokens, power, dim=0, dtype=torch.float64)
        before, count = sums.get(name, (0, 0))
        sums[name] = before + norms**power, count + len(tokens)

    handles = []
    scalings = {layer: layer.scaling for layer in layers.values()}
    try:
        for name, layer in layers.items():
            handles.append(
                layer.register_forward_pre_hook(
                    lambda module, arguments, name=name: record(name, arguments[0])
                )
            )
            # The activations of the model without its adapters.
            layer.scaling = 0.0
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for layer, scaling in scalings.items():
            layer.scaling = scaling
    if not sums:
        raise ValueError(f"{_OP}: batches must run the NoRALinear layers, got none that does")
    return sums


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _diagonal(name: str, sums: Tensor | None, count: int, diagonal: str, floor: float) -> Tensor:
    if sums is None:
        raise ValueError(f"{_OP}: batches must reach every NoRALinear, none reached {name}")
    values = (sums / count if diagonal == "mean_abs_sqrt" else sums).sqrt()
    largest = values.max()
    if not (torch.isfinite(largest) and largest > 0):
        accepted = "finite and not all zero"
        raise ValueError(f"{_OP}: the inputs of {name} must be {accepted}, got {largest:g} at most")
    return values.clamp_min(floor * largest)
