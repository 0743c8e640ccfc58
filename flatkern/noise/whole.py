"""Whether the tensor that a module holds is the weight itself.

Some libraries leave in a module a part of its weight, or nothing, and fill it in around each
forward. Noise on such a tensor would be other noise than the weight's, or none.
"""

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flatkern.nn import shards

# What DeepSpeed's ZeRO-3 notes on a parameter that it partitions.
_ZERO3 = ("ds_id", "ds_shape", "ds_tensor")


def require_whole(op: str, name: str, weight: Tensor) -> None:
    """ValueError unless `weight` is the weight `name`, all of it and in memory.

    A DTensor is one: it knows where its parts belong. So is a tensor without elements, unless a
    library says that it stands for something larger.

    Args:
        op: who asks, for the message.
        name: of the weight in the model.
        weight: the tensor that its module holds.
    """
    reason = why_not_whole(weight)
    if reason is not None:
        raise ValueError(f"{op}: {name} must be held whole by its module, got {reason}")


def why_not_whole(weight: Tensor) -> str | None:
    """What `weight` is instead of a weight, with what can be done; None if it is one."""
    if is_lazy(weight):
        return f"{type(weight).__name__}; run one forward first"
    if any(hasattr(weight, mark) for mark in _ZERO3):
        return "a parameter that DeepSpeed ZeRO-3 partitions; use ZeRO-1 or 2, DDP or FSDP2"
    if getattr(weight, "_is_flat_param", False) or getattr(weight, "_fsdp_flattened", False):
        return "a flat shard of FSDP version 1; use torch.distributed.fsdp.fully_shard (FSDP2)"
    if weight.is_meta:
        return "a tensor on the meta device; load it, and keep it from being offloaded"
    local = weight.to_local() if shards.is_sharded(weight) else weight
    if not is_traceable_wrapper_subclass(local) and _is_freed(local):
        return "a tensor whose memory was freed; what frees it between forwards cannot be used"
    return None


def _is_freed(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    return tensor.untyped_storage().nbytes() == 0
