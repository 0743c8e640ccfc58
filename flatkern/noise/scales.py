"""Row scales: the standard deviation of the noise of each row, for all weights in few calls."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check

_OP = "WeightNoise"


class Scales:
    """The row scales of targets, as lists that serve until a weight is replaced, moved or cast."""

    def __init__(self, targets: list[Any], out: list[Tensor] | None = None) -> None:
        """Write into `out`, or into the targets' own."""
        self._targets = targets
        self._out = [target.row_scale for target in targets] if out is None else out
        where = dict(zip(targets, self._out, strict=True))
        self._groups = []
        # By a group's first target, its adapters that passed the checks.
        self._checked: dict[Any, list[int]] = {}
        for (strategy, merged, *_), group in grouped(targets, _scaled_alike):
            # Quantised weights and shards are looked at anew in each window.
            weights = [target.by_row for target in group] if group[0].by_row is not None else None
            sites = [target.layers[0] for target in group] if merged else []
            own = [where[target] for target in group]
            self._groups.append((STRATEGIES[strategy], group, own, weights, sites))

    def _check(self, group: list[Any], operands: list[tuple[Tensor, Tensor, float]]) -> None:
        """The adapters, where they are others than those that were checked before."""
        now = [id(part) for pair in operands for part in pair[:2]]
        if now == self._checked.get(group[0]):
            return
        for target, (lora_A, lora_B, scaling) in zip(group, operands, strict=False):
            # As many adapters as matrices in a stack, of which the first stands for all.
            rows = target.rows.count(target.shape)
            shape = rows, target.shape.numel() // max(rows, 1)
            if lora_A.dim() == 3:
                shape = rows // lora_A.shape[0], shape[1]
                lora_A, lora_B = lora_A[0], lora_B[0]
            op = f"{_OP}: {target.name}"
            _check.adapters(op, lora_A, lora_B, scaling, shape, target.weight.device)
        self._checked[group[0]] = now

    def write(self, sigma: float) -> None:
        """Fill them from the clean weights."""
        for strategy, group, out, weights, sites in self._groups:
            operands = [site.operands() for site in sites]
            self._check(group, operands)
            strategy(
                out,
                weights or [target.make_by_row() for target in group],
                [lora_A for lora_A, _, _ in operands] or None,
                [lora_B for _, lora_B, _ in operands] or None,
                [scaling for _, _, scaling in operands] or [1.0] * len(group),
                sigma,
            )
        for target, out in zip(self._targets, self._out, strict=True):
            if target.fisher is not None:
                out.copy_(target.fisher.divide(target.name, out))
            if target.rows.padding is not None:
                out[target.rows.padding] = 0.0


def _scaled_alike(target: Any) -> tuple[Hashable, ...]:
    """What weights have in common whose scales are found in one call: quantised ones one by one,
    because their elements take memory.
    """
    number = None if target.quantized is None else target.number
    plain = target.by_row is not None
    return target.strategy, target.merged, number, plain, target.backend, target.key.device


def grouped(targets: list[Any], kind: Callable[[Any], Hashable]) -> list[tuple[Any, list[Any]]]:
    """The targets of each kind, in order."""
    groups: dict[Hashable, list[Any]] = {}
    for target in targets:
        groups.setdefault(kind(target), []).append(target)
    return list(groups.items())
