"""Contexts in which a model is other than it is, exactly undone on any exit."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from flatkern.nn.shards import part_of

# Batch and instance norms: whatever has statistics that a forward in training mode updates.
_TRACKING = (nn.modules.batchnorm._NormBase,)


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever is written in `tensors`, their exact bits come back. Costs a copy of them.

    Yields the copies, of sharded tensors those of this rank's parts.

    An autocast around several passes would go on using what it cast before: it forgets that.
    """
    # Of a sharded tensor what this rank holds: the list op takes no DTensors.
    tensors = [part_of(tensor.detach()).local for tensor in tensors]
    copies = [tensor.clone() for tensor in tensors]

    def put_back() -> None:
        if copies:
            torch._foreach_copy_(tensors, copies)
        copies.clear()
        torch.clear_autocast_cache()

    torch.clear_autocast_cache()

    # Twice, so that Ctrl-C in the first one's copying still restores.
    try:
        try:
            yield copies
        finally:
            put_back()
    finally:
        put_back()


@contextlib.contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use their batch, as in training, and leave their running statistics alone.

    For the second pass over a batch, and for passes at perturbed weights.
    """
    modules = [
        module
        for module in model.modules()
        if isinstance(module, _TRACKING) and module.training and module.track_running_stats
    ]
    try:
        for module in modules:
            module.track_running_stats = False
        yield
    finally:
        for module in modules:
            module.track_running_stats = True
