"""Row norms of the merged weight in plain PyTorch."""

import torch
from torch import Tensor


def row_norm(
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """||(W + s B A)_i||_2, float32 [m]; computed in float64, the merged weight materialised."""
    merged = weight.double()
    if lora_A is not None and lora_B is not None:
        merged = merged + scaling * (lora_B.double() @ lora_A.double())
    return torch.linalg.vector_norm(merged, dim=1).float()
