"""Row scales: the standard deviation of the noise of each row, for all weights in few calls."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from flatkern.noise.strategies import STRATEGIES
from flatkern.noise.targets import Target
from flatkern.ops import _check

_OP = "WeightNoise"


class Scales:
    """The row scales of weights, as lists that serve until one is replaced, moved or cast."""

    def __init__(self, states: list[Any], out: list[Tensor] | None = None) -> None:
        """Write into `out`, or into those of the windows' `State` of each weight."""
        own = [state.row_scale for state in states] if out is None else out
        self._divided = [
            (state.target, scale)
            for state, scale in zip(states, own, strict=True)
            if state.target.fisher is not None
        ]
        self._padded = [
            (state.target.rows.padding, scale)
            for state, scale in zip(states, own, strict=True)
            if state.target.rows.padding is not None
        ]
        where = dict(zip(states, own, strict=True))
        self._groups = []
        # By a group's first target, its adapters that passed the checks.
        self._checked: dict[Target, list[int]] = {}
        for (strategy, merged, *_), group in grouped(states, _scaled_alike):
            targets = [state.target for state in group]
            # Quantised weights and shards are looked at anew in each window.
            weights = [state.by_row for state in group] if group[0].by_row is not None else None
            sites = [target.layers[0] for target in targets] if merged else []
            scales = [where[state] for state in group]
            self._groups.append((STRATEGIES[strategy], targets, scales, weights, sites))

    def _check(self, group: list[Target], operands: list[tuple[Tensor, Tensor, float]]) -> None:
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
        for target, scale in self._divided:
            scale.copy_(target.fisher.divide(target.name, scale))
        for padding, scale in self._padded:
            scale[padding] = 0.0


def _scaled_alike(state: Any) -> tuple[Hashable, ...]:
    """What weights have in common whose scales are found in one call: quantised ones one by one,
    because their elements take memory.
    """
    target, plain = state.target, state.by_row is not None
    number = None if target.quantized is None else target.number
    return target.strategy, target.merged, number, plain, state.backend, state.key.device


def grouped(states: list[Any], kind: Callable[[Any], Hashable]) -> list[tuple[Any, list[Any]]]:
    """Those of each kind, in order."""
    groups: dict[Hashable, list[Any]] = {}
    for state in states:
        groups.setdefault(kind(state), []).append(state)
    return list(groups.items())
