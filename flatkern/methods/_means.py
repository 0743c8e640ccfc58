"""Running means of methods: what they hold for each weight, by its name, from step to step."""

from typing import Any

import torch
from torch import Tensor

from flatkern.ops import _check


def mean_of_state(
    op: str, state_dict: Any, weights: dict[str, Tensor], accepted: str
) -> dict[str, Tensor]:
    """The entry "mean" of what `state_dict` gave, checked: copies, not in 16 bits.

    Args:
        op: the method, for errors.
        state_dict: anything; without the entry, of a method's first step, there is no mean.
        weights: by name, what each mean is of.
        accepted: what the names are, for errors.

    Raises:
        TypeError, ValueError: other names, kinds or shapes than those of the weights.
    """
    mean = state_dict.get("mean", {}) if isinstance(state_dict, dict) else {}
    _check.kinds(op, dict, mean=mean)
    for name, value in mean.items():
        if name not in weights:
            _check.refuse(op, "mean", accepted, name)
        _check.kinds(op, Tensor, **{f"mean[{name!r}]": value})
        shape = weights[name].shape
        if value.shape != shape:
            _check.refuse(op, f"mean[{name!r}]", f"of shape {list(shape)}", value)
    return {name: _wide_copy(value, weights[name]) for name, value in mean.items()}


def _wide_copy(value: Tensor, weight: Tensor) -> Tensor:
    return value.to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True)
