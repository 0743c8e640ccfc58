"""Which way weights lie: whether a matrix, or each of a stack, is [out, in] or [in, out]."""

import sys

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# transformers' stacks [k, in, out] of matrices that do not say so.
_TRANSPOSED = ("GroupedLinearLayer", "CsmCodebooksHead")


def is_stack(module: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is a stack [k, p, q] of matrices."""
    return weight.dim() == 3 and not isinstance(module, _ConvNd | nn.Bilinear)


def is_transposed(module: nn.Module, name: str) -> bool:
    """Whether a stack of matrices is [k, in, out], not [k, out, in].

    transformers' experts say it, but Llama 4's: told by gate_up_proj and down_proj, of which one
    takes what the other gives.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    if type(module).__name__ in _TRANSPOSED and _is_transformers(module):
        return name == "weight"
    up, down = (module._parameters.get(own) for own in ("gate_up_proj", "down_proj"))
    if name not in ("gate_up_proj", "down_proj") or up is None or down is None:
        return False
    if up.dim() != 3 or down.dim() != 3:
        return False
    return up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]


def transposed_blocks(module: nn.Module, name: str) -> int:
    """How many matrices [in, out] lie below one another in a matrix; 0 if its rows are outputs."""
    if name == "weight" and is_conv1d(module):
        return 1
    if name == "w2" and type(module).__name__ == "DbrxExpertGLU" and _is_transformers(module):
        return module.moe_num_experts
    return 0


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with a weight [in, out]."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")
