"""Tensor numbers: which word of a noise key says which parameter of a model it is."""

from torch import nn

from flatkern.nn.sites import site_of

ADAPTERS = 2**31


def tensor_numbers(model: nn.Module) -> dict[str, int]:
    """The number of every parameter, by name.

    Base parameters are counted in `named_parameters()` order, adapters apart and from 2^31 on, so
    a number depends neither on what is noisy nor on which layers were wrapped.
    """
    adapters = {
        id(part)
        for site in map(site_of, model.modules())
        if site is not None
        for part in site.adapters().values()
    }
    numbers, following = {}, {False: 0, True: ADAPTERS}
    for name, parameter in model.named_parameters():
        is_adapter = id(parameter) in adapters
        numbers[name] = following[is_adapter]
        following[is_adapter] += 1
    return numbers
