"""Unknown keywords, named after the public function that got them."""

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown(op: str, accepted: Iterable[str], given: Iterable[str]) -> None:
    """TypeError that names the first of the given keywords that is not accepted."""
    accepted = list(accepted)
    for keyword in given:
        if keyword in accepted:
            continue
        close = get_close_matches(keyword, accepted, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"accepted are {', '.join(accepted)}"
        raise TypeError(f"{op}: unknown keyword {keyword}; {hint}")


def known_keywords(op: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function, or a class's `__init__`, refuse keywords that its signature does not have.

    The signature, for editors and type checkers, stays.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        accepted = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not kwargs.keys() <= set(accepted):
                refuse_unknown(op, accepted, kwargs)
            return function(*args, **kwargs)

        return checked

    return decorate
