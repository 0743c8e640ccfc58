"""Triton's interpreter without what it computes for nothing, which is half of its time.

What a kernel computes stays. Where another Triton has other internals, so does its time.
"""

import dataclasses
import functools


class _Kept:
    """What a launch restores at its end: nothing, so that the next finds triton.language ready."""

    def restore(self):
        pass


def _patch_once(patch):
    """Per module: each launch and each call of a device function would search triton.language."""
    patched = set()

    @functools.wraps(patch)
    def once(fn):
        if fn.__module__ not in patched:
            patch(fn)
            patched.add(fn.__module__)
        return _Kept()

    return once


def _by_name(find):
    """Of blocks as of what is in them; the interpreter builds its table anew at each look."""
    found = {}

    @functools.wraps(find)
    def by_name(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    return by_name


def quicken():
    """Call once, where TRITON_INTERPRET is set."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    # Sums of integers are made in 64 bits too, and compared; only debug mode asks how it went.
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    for name, quicker in (("_patch_lang", _patch_once), ("_get_np_dtype", _by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, quicker(getattr(interpreter, name)))
