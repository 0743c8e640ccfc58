"""Why a window cannot show the base weight of a PEFT layer."""

from peft.tuners import adalora, lora
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flatkern.integrations import quantized
from flatkern.nn import shards
from flatkern.ops import _check

# That of embeddings is a subclass of the first.
DORA = DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
# Where PEFT has its layers over those of bitsandbytes, all of them linear.
_BNB_LAYERS = ("peft.tuners.lora.bnb", "peft.tuners.adalora.bnb")


def why_not(layer: nn.Module) -> str | None:
    """Why no window can show the base weight of a PEFT layer, or None if one can."""
    of_bnb = type(layer).__module__ in _BNB_LAYERS
    if not (of_bnb or isinstance(layer, lora.Linear | adalora.SVDLinear)):
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    base = layer.base_layer
    reason = why_not_base(base, "weight")
    if reason is not None:
        return reason
    stored = quantized.stored(base)
    reason = _why_no_linear(base) if stored is None else stored.why_not()
    return reason or why_not_variant(layer)


def why_not_base(base: nn.Module, parameter: str) -> str | None:
    """Why nothing may stand in front of a module's forward, or its weight is none."""
    if "forward" in base.__dict__ and not _is_styled(base):
        return "base layer with a forward of its own (offloaded, say)"
    if not isinstance(getattr(base, "_parameters", {}).get(parameter), nn.Parameter):
        return f"base layer {type(base).__name__} whose {parameter} is not a parameter"
    return None


def why_not_variant(layer: nn.Module) -> str | None:
    """The name of a variant of LoRA other than DoRA, if an adapter is one."""
    for variant in getattr(layer, "lora_variant", {}).values():
        if not isinstance(variant, DORA):
            return type(variant).__name__
    return None


def _why_no_linear(base: nn.Module) -> str | None:
    if type(base) is not nn.Linear:
        return f"base layer {type(base).__name__}"
    weight = base.weight
    if not is_plain(weight):
        return not_plain(weight)
    if hasattr(base, "_hf_tp_plan") and not shards.is_sharded(weight):
        return "base weight that is a part of a larger one, and no DTensor"
    return None


def is_plain(weight: Tensor) -> bool:
    """Whether it, or this rank's part of it, is floating-point elements and nothing else."""
    local = weight.to_local() if shards.is_sharded(weight) else weight
    return not is_traceable_wrapper_subclass(local) and weight.dtype in _check.FLOAT_DTYPES


def not_plain(weight: Tensor) -> str:
    """What a weight that is not plain is."""
    local = weight.to_local() if shards.is_sharded(weight) else weight
    if is_traceable_wrapper_subclass(local):
        return f"base weight of type {type(local).__name__}"
    return f"base weight of dtype {weight.dtype}"


def _is_styled(base: nn.Linear) -> bool:
    """Whether its forward is that of transformers' tensor parallelism, around the module's own."""
    return getattr(base, "_hf_tp_plan", None) in ("colwise", "rowwise")
