"""Modes: which there are, which a window takes if the rule decides, what they cannot write."""

from collections.abc import Iterable

from flatkern.nn.linear import LoRALinear
from flatkern.noise.targets import Target
from flatkern.ops import _check
from flatkern.ops.residual import is_available

MODES = ("virtual", "inplace", "auto")
# In place from so many micro-batches on: a window in place costs about what noise costs a virtual
# one in two of them (docs/modes.md).
INPLACE_FROM = 3


def mode_for(op: str, mode: str, micro_batches: int, targets: list[Target]) -> str:
    """The mode of a window that so many passes share, of a `WeightNoise` with this mode."""
    _check.kinds(op, int, micro_batches=micro_batches)
    if micro_batches < 1:
        _check.refuse(op, "micro_batches", "at least 1", micro_batches)
    return best_mode(micro_batches, all_writable(targets)) if mode == "auto" else mode


def best_mode(micro_batches: int, writable: bool) -> str:
    """The faster mode that gives every reader of the weights the same values.

    Args:
        micro_batches: forward and backward passes that share the window.
        writable: see `all_writable`.
    """
    return "inplace" if writable and micro_batches >= INPLACE_FROM else "virtual"


def check_mode(op: str, mode: str, targets: Iterable[Target]) -> None:
    """ValueError if noise would be written where it cannot be.

    In a weight that is stored quantised, or in one that layers share with a scale each.
    """
    seen = set()
    for target in targets:
        if mode == "inplace" and target.name in seen:
            accepted = f"'virtual' or 'auto' where adapted layers share a weight, as {target.name}"
            _check.refuse(op, "mode", f"{accepted} is, with a scale of its own for each", mode)
        seen.add(target.name)
        if mode == "inplace" and target.quantized is not None:
            accepted = f"'virtual' or 'auto' where weights are quantised, as {target.name} is"
            _check.refuse(op, "mode", accepted, mode)


def all_writable(targets: Iterable[Target]) -> bool:
    """Whether noise may be written in the weights without anyone being the wiser.

    Nobody but layers that add the noise anyway holds them, and the backend has kernels for the
    residual that brings their bits back: no copy of the weights is made unasked. What no layer can
    add noise to is written in any mode. Layers that share a weight must not want a scale each.
    """
    targets = list(targets)
    if len({target.name for target in targets}) < len(targets):
        return False
    return all(
        all(isinstance(module, LoRALinear) for module, _ in target.owners)
        and is_available(target.weight, native=True)
        for target in targets
        if target.layers
    )
