"""Fewer cases where Triton's interpreter computes them: it takes a hundred times as long."""

from flatkern._machine import TRITON_INTERPRETED as INTERPRETED


def cases(every, some):
    """Each `every`-th of `some` under the interpreter, else all."""
    return some[::every] if INTERPRETED else some


def trials(count):
    """A fifth under the interpreter."""
    return count // 5 if INTERPRETED else count
