"""Undoing to the end, whatever interrupts it."""

from collections.abc import Callable


def twice(undo: Callable[[], None]) -> None:
    """Call what goes on where it was interrupted, and does nothing where it is done.

    A Ctrl-C in the first call, whose error is raised, thus leaves nothing half undone.
    """
    try:
        undo()
    finally:
        undo()
