"""Micro-batches of an ordinary loader, as `Method.step` takes them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from flatkern.ops import _check

T = TypeVar("T")


def micro_batches(loader: Iterable[T], count: int) -> Iterator[list[T]]:
    """Lists of `count` batches, one list for each optimizer step; the last may be shorter.

        for batches in micro_batches(loader, 4):
            method.step(loss_fn, batches)

    A loader is read as it is needed, so whatever it shuffles or loads in workers stays its own.

    Args:
        loader: anything that gives batches, a `DataLoader` for example.
        count: micro-batches of a step, at least 1.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, at once.
    """
    _check.kinds("micro_batches", Iterable, loader=loader)
    _check.kinds("micro_batches", int, count=count)
    if count < 1:
        _check.refuse("micro_batches", "count", "at least 1", count)
    batches = iter(loader)
    return iter(lambda: list(islice(batches, count)), [])
