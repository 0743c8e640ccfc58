"""Tensor numbers: which word of a noise key says which parameter of a model it is."""

import sys
from collections.abc import Iterator

from torch import nn

from flatkern.nn.names import named_parameters
from flatkern.nn.sites import site_of

ADAPTERS = 2**31
# PEFT's modules with parameters of their own, and under which names they have what they adapt.
# Known by type and without importing PEFT: attached or not, the adapters are the same.
_OF_PEFT = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer", ("base_layer",)),
    ("peft.tuners.tuners_utils", "BaseTuner", ("model",)),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", ("original_module",)),
    ("peft.peft_model", "PeftModel", ("base_model",)),
    ("peft.tuners.adaption_prompt.layer", "_BaseAdaptedAttention", ("model",)),
)


def tensor_numbers(model: nn.Module) -> dict[str, int]:
    """The number of every parameter, by its name in the unwrapped model.

    Base parameters are counted in `named_parameters()` order, adapters apart and from 2^31 on, so
    a number depends neither on what is noisy nor on which layers were wrapped.
    """
    adapters = set(_adapters(model))
    numbers, following = {}, {False: 0, True: ADAPTERS}
    for name, parameter in named_parameters(model):
        is_adapter = id(parameter) in adapters
        numbers[name] = following[is_adapter]
        following[is_adapter] += 1
    return numbers


def _adapters(model: nn.Module) -> Iterator[int]:
    """The ids of the parameters that are an adapter's.

    Of PEFT's modules that is whatever is not in what they adapt: matrices, magnitudes, prompts,
    shared vectors, the trained copies of `modules_to_save`.
    """
    found = ((sys.modules.get(where), kind, bases) for where, kind, bases in _OF_PEFT)
    kinds = [(getattr(m, kind), bases) for m, kind, bases in found if hasattr(m, kind)]
    for module in model.modules():
        site = site_of(module)
        if site is not None:
            yield from map(id, site.adapters().values())
            continue
        for kind, bases in kinds:
            if isinstance(module, kind):
                yield from _own(module, bases)


def _own(module: nn.Module, bases: tuple[str, ...]) -> Iterator[int]:
    """What a module of PEFT's has besides what it adapts."""
    inside = {
        id(part)
        for base in bases
        if isinstance(module._modules.get(base), nn.Module)
        for part in module._modules[base].parameters()
    }
    for name, value in module.named_parameters():
        # By name as well: PEFT's MultiheadAttention makes new parameters whenever it is listed.
        if id(value) not in inside and name.split(".")[0] not in bases:
            yield id(value)
