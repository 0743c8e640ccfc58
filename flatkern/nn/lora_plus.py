"""LoRA+: a larger learning rate for B than for A."""

from typing import Any

from torch import nn

from flatkern.nn.linear import LoRALinear
from flatkern.nn.parameters import LoRAParameter
from flatkern.ops import _check

_OP = "lora_plus_groups"


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: B at ratio * lr, whatever else is trainable at lr.

    B is `lora_B`, or NoRA's `nora_B`. Source: Hayou et al., "LoRA+", 2024.

    Args:
        model: with `LoRALinear` layers.
        lr: the rate of A, finite and above 0.
        ratio: lr_B / lr_A, finite and above 0.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a rate out of range, or no trainable B.

    Example:

        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=2e-4))
    """
    _check.kinds(_OP, nn.Module, model=model)
    _check.kinds(_OP, (float, int), lr=lr, ratio=ratio)
    for name, value in (("lr", lr), ("ratio", ratio)):
        _check.finite(_OP, name, value, minimum=0.0)
        if value == 0:
            _check.refuse(_OP, name, "above 0", value)
    second = {
        id(value)
        for layer in model.modules()
        if isinstance(layer, LoRALinear | LoRAParameter)
        for name, value in layer.adapters().items()
        if name.endswith("_B")
    }
    trainable = [value for value in model.parameters() if value.requires_grad]
    fast = [value for value in trainable if id(value) in second]
    slow = [value for value in trainable if id(value) not in second]
    if not fast:
        raise ValueError(f"{_OP}: model must have a trainable B in LoRALinear layers, got none")
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]
    return [group for group in groups if group["params"]]
