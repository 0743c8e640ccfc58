"""Figures of a model with adapters that a training log can show: noise, balance, conditioning."""

import math

import torch
from torch import nn

from flatkern.landscape._weights import Weight, find_weights
from flatkern.nn import shards
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check

_STRATEGIES = tuple(name for name in STRATEGIES if name != "fisher")


def adapter_figures(
    model: nn.Module, *, sigma: float | None = None, strategy: str = "flat_lora"
) -> dict[str, float]:
    """What the adapters of a model are like, in means and extremes over its layers.

    - balancedness: 1/2 (||B||^2 - ||A||^2), the mean over layers. Source: BAR (Li et al.,
      "Implicit regularization of sharpness-aware minimization for scale-invariant problems", 2024,
      arXiv:2410.14802), whose sign is that of its two factors.
    - condition_A, condition_A_max: the largest singular value of A over the smallest, the geometric
      mean over layers and the largest; infinite for an A of lower rank.

    With `sigma` also the size of its noise, in root mean squares over draws:

    - noise_to_weight: ||e_W|| / ||W'|| over all layers together; sigma itself for "flat_lora".
    - noise_BA_to_W: ||s e_B A|| / ||e_W||: noise of the same strategy on B alone, seen in W',
      beside noise in all of W'. Source: Flat-LoRA (Li et al., 2024, arXiv:2409.14396), section 3.2.

    Args:
        model: clean, with LoRALinear or attached PEFT layers.
        sigma: strength, finite and at least 0.
        strategy: one of `flatkern.WeightNoise`'s but "fisher".

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or no such layers.
        RuntimeError: a noise window is open, or a layer is merged.
    """
    op = "adapter_figures"
    _check.kinds(op, (float, int), optional=True, sigma=sigma)
    if sigma is not None:
        _check.finite(op, "sigma", sigma, minimum=0.0)
    _check.one_of(op, _STRATEGIES, strategy=strategy)
    weights = find_weights(op, model, "merged", strategy)
    layers = [(weight, *_factors(weight)) for weight in weights]
    balance, conditions = [], []
    for _, lora_A, lora_B, _ in layers:
        balance.append(0.5 * float(lora_B.square().sum() - lora_A.square().sum()))
        values = torch.linalg.svdvals(lora_A)
        conditions.append(float(values[0] / values[-1]))
    figures = {
        "balancedness": math.fsum(balance) / len(balance),
        "condition_A": math.exp(math.fsum(map(math.log, conditions)) / len(conditions)),
        "condition_A_max": max(conditions),
    }
    if sigma is None:
        return figures
    own, length, through = 0.0, 0.0, 0.0
    for weight, lora_A, lora_B, scaling in layers:
        squares = weight.norms().square()
        columns = weight.shape[1:].numel()
        length += float(squares.sum())
        if weight.elementwise:
            own += float(weight.norms(merged=False).square().sum())
        else:
            own += columns * float(weight.scale(strategy).double().square().sum())
        through += scaling**2 * _through(lora_A, lora_B, strategy)
    figures["noise_to_weight"] = sigma * math.sqrt(own / length) if length else math.nan
    figures["noise_BA_to_W"] = math.sqrt(through / own) if own else math.nan
    return figures


def _factors(weight: Weight) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B (whole, float64) and s of a layer."""
    lora_A, lora_B, scaling = weight.sites[0].operands()
    return *(shards.whole(part.detach()).double() for part in (lora_A, lora_B)), scaling


def _through(lora_A: torch.Tensor, lora_B: torch.Tensor, strategy: str) -> float:
    """E ||e_B A||^2 at sigma = 1: sum over B's elements of S_ik^2 ||A_k||^2."""
    rows = lora_A.square().sum(1)
    if strategy == "element":
        return float((lora_B.square() * rows).sum())
    scale = torch.empty(lora_B.shape[0], dtype=torch.float32, device=lora_B.device)
    STRATEGIES[strategy]([scale], [lora_B.float()], None, None, [1.0], 1.0)
    return float(scale.double().square().sum() * rows.sum())
