"""Comparison to the bit: NaN payloads and the sign of zero count."""

import torch
from torch import Tensor


def bits(weight: Tensor) -> Tensor:
    return weight.detach().view({2: torch.int16, 4: torch.int32}[weight.element_size()])


def changed(after: Tensor, before: Tensor) -> int:
    """How many elements have other bits than before."""
    return int((bits(after) != bits(before)).sum())
