"""What flatkern is measured against: the published algorithm, and the best eager PyTorch.

The published one is that of the Flat-LoRA trainer, https://github.com/nblt/Flat-LoRA, written from
its equations: norms of W + s B A in float32, noise in float32 from the reseeded global generator,
added to the weight and later subtracted, each sum rounded to the weight's dtype. It ramps sigma up
by a cosine.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatkern.nn import LoRALinear


def published_row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms [m, 1] of W + s B A, which is formed."""
    merged = weight.float() + scaling * (lora_B @ lora_A)
    return merged.norm(dim=1, keepdim=True)


def published_noise(norm: Tensor, sigma: float, cols: int, seed: int) -> Tensor:
    """Noise [m, n]: the global generator reseeded, the standard deviation repeated to m x n."""
    torch.manual_seed(seed)
    return torch.normal(0.0, norm.repeat(1, cols) * (sigma / math.sqrt(cols)))


def published_perturb_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sigma: float, seed: int
) -> Tensor:
    """Add the noise, norm included; return the norms, which the restore needs."""
    norm = published_row_norm(weight, lora_A, lora_B, scaling)
    # Not cast first: the noise is float32, and the sum alone is rounded.
    weight += published_noise(norm, sigma, weight.shape[1], seed)
    return norm


def published_restore_(weight: Tensor, norm: Tensor, sigma: float, seed: int) -> None:
    """Regenerate the same noise and subtract it."""
    weight -= published_noise(norm, sigma, weight.shape[1], seed)


def eager_row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The best eager row norm: ||W_i||^2 + 2 s <B_i, (W A^T)_i> + s^2 B_i (A A^T) B_i^T."""
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    cross = (weight @ lora_A.to(weight.dtype).t()).float()
    low_rank = lora_B @ (lora_A @ lora_A.t())
    square += 2 * scaling * (lora_B * cross).sum(1) + scaling**2 * (low_rank * lora_B).sum(1)
    return square.clamp_(min=0).sqrt_()


def eager_perturb_(weight: Tensor, row_scale: Tensor) -> None:
    """The best eager perturbation: one temporary, in the weight's dtype, scaled in place."""
    noise = torch.randn_like(weight)
    weight.add_(noise.mul_(row_scale.to(weight.dtype)[:, None]))


def eager_perturb_plane_(weight: Tensor, first: Tensor, second: Tensor) -> None:
    """Two noises, each with a scale for every row: two temporaries in the weight's dtype."""
    noise = torch.randn_like(weight).mul_(first.to(weight.dtype)[:, None])
    other = torch.randn_like(weight).mul_(second.to(weight.dtype)[:, None])
    weight.add_(noise.add_(other))


def eager_perturb_merged_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sigma: float
) -> Tensor:
    """Norm and perturbation; returns the row scale."""
    norm = eager_row_norm(weight, lora_A, lora_B, scaling)
    row_scale = norm * (sigma / math.sqrt(weight.shape[1]))
    eager_perturb_(weight, row_scale)
    return row_scale


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Plain LoRA, without noise."""
    branch = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * scaling
    return F.linear(x, weight) + branch.to(x.dtype)


def eager_noisy_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, row_scale: Tensor
) -> Tensor:
    """The best eager noisy layer: a perturbed copy that autograd keeps until backward."""
    noise = torch.randn_like(weight).mul_(row_scale.to(weight.dtype)[:, None])
    return lora_linear(x, noise.add_(weight), lora_A, lora_B, scaling)


class Published:
    """A training step of the published algorithm, for its time and memory."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, sigma: float, seed: int
    ) -> None:
        """Noise of constant `sigma` over every LoRALinear of `model`."""
        self._optimizer, self._sigma, self._seed = optimizer, sigma, seed
        self._layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]

    def step(self, loss_fn: Callable[[Any], Tensor], batches: list[Any]) -> float:
        """As `flatkern.methods.Method.step`; the weights are not quite what they were."""
        norms = []
        for layer in self._layers:
            parts = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
            norms.append(published_perturb_(*parts, layer.scaling, self._sigma, self._seed))
        total = 0.0
        for batch in batches:
            loss = loss_fn(batch) / len(batches)
            loss.backward()
            total += loss.item()
        for layer, norm in zip(self._layers, norms, strict=True):
            published_restore_(layer.weight.detach(), norm, self._sigma, self._seed)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total
