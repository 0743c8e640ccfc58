"""Ranks that hold weights together: they go the same way, or none does."""

import contextlib
from collections.abc import Iterator

import torch

from flatkern.landscape._weights import Weight
from flatkern.nn import shards


class Ranks:
    """The ranks of a measurement; one alone where no weight is sharded.

    Attributes:
        first: whether this one writes files.
    """

    def __init__(self, weights: list[Weight]) -> None:
        """All ranks make one."""
        self._device = next((w.device for w in weights if shards.is_sharded(w.held)), None)
        self.first = self._device is None or torch.distributed.get_rank() == 0

    @contextlib.contextmanager
    def agreed(self, op: str) -> Iterator[None]:
        """An error inside, of this rank or another, is raised on all of them.

        Raises:
            RuntimeError: another rank had one.
        """
        if self._device is None:
            yield
            return
        error = None
        try:
            yield
        except Exception as found:  # the others must not wait for this rank
            error = found
        failed = torch.tensor(float(error is not None), device=self._device)
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{op}: another rank could not go on; its error says why")
