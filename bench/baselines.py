"""The best eager PyTorch that flatkern is measured against, and the published algorithm."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flatkern.demo.published import published_perturb_, published_restore_, published_row_norm

__all__ = ["published_perturb_", "published_restore_", "published_row_norm"]


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


def eager_perturb_merged_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sigma: float
) -> Tensor:
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
