"""The weights that a landscape is seen over, and what is added to each of them at a point."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern.nn import shards
from flatkern.noise import NoiseKey, registry
from flatkern.noise.numbers import ADAPTERS, tensor_numbers
from flatkern.noise.rows import Rows
from flatkern.noise.scopes import SCOPES, collect, warn_of
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check

# The step word of every key here: no training reaches it, so that what is measured is never the
# noise that a model was trained with.
STEP = 2**32 - 1
# Elements of noise that are made at a time where they are not made in a kernel: 1 MiB.
_PANEL = 2**18


class Shift(NamedTuple):
    """e_ij = sum_k c_ki z_kij (|W_ij|) of one weight: one noise, or two.

    Attributes:
        scales: float32 [k, rows].
        keys: int64 [k, 4].
        elementwise: whether e is multiplied by |W_ij|; of one noise only.
    """

    scales: Tensor
    keys: Tensor
    elementwise: bool = False


class Weight:
    """One weight: where modules hold it, and which of its elements are a row.

    Attributes:
        name, number: as in `WeightNoise`.
        places: every (module, parameter name) that shows it.
        quantized: how it is stored, if not as its elements.
    """

    def __init__(self, target: Any, places: list[tuple[nn.Module, str]]) -> None:
        """What a noise window calls a target, for its names and numbers alone."""
        self.name, self.number = target.name, target.number
        self.strategy, self.merged = target.strategy, target.merged
        self.rows: Rows = target.rows
        self.sites = target.layers
        self.places = places
        self.quantized = self.sites[0].quantized if self.sites else None

    @property
    def held(self) -> Tensor:
        """The parameter, as the first of its modules holds it now."""
        module, name = self.places[0]
        return module._parameters[name]

    @property
    def shape(self) -> torch.Size:
        """Of all its elements; of what has no dimensions, [1]."""
        shape = self.held.shape if self.quantized is None else self.quantized.shape
        return shape or torch.Size([1])

    @property
    def device(self) -> torch.device:
        """Of the weight."""
        return self.held.device

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.rows.count(self.shape)

    @property
    def elementwise(self) -> bool:
        """Whether its strategy multiplies the noise by |W_ij|."""
        return self.strategy == "element"

    def key(self, seed: int, draw: int) -> Tensor:
        """int64 [4] on the weight's device."""
        return NoiseKey(seed, STEP, draw, self.number).to(self.device)

    def _operands(self) -> tuple[list, list | None, list | None, list]:
        """By row, as scale strategies take them; the adapters where the scale is of W'."""
        weight = self.held.detach()
        if self.quantized is not None:
            weight = self.quantized.dequantize(torch.float32).detach()
        weight = weight if weight.dim() else weight.view(1)
        if not shards.is_sharded(weight):
            weight = _dense(weight)
        by_row = self.rows.by_row(weight)
        if not self.merged:
            return [by_row], None, None, [1.0]
        lora_A, lora_B, scaling = self.sites[0].operands()
        return [by_row], [lora_A.detach()], [lora_B.detach()], [scaling]

    def scale(self, strategy: str) -> Tensor:
        """c of every row at sigma = 1, float32; collective where the weight is sharded."""
        out = torch.empty(self.count, dtype=torch.float32, device=self.device)
        STRATEGIES[strategy]([out], *self._operands(), 1.0)
        return self.without_padding(out)

    def without_padding(self, rows: Tensor) -> Tensor:
        """Values [..., rows], with 0 for the row that takes no noise; in place."""
        if self.rows.padding is not None:
            rows[..., self.rows.padding] = 0
        return rows

    def norms(self, merged: bool = True) -> Tensor:
        """||W_i|| of every row, float64; of W' where the scale is, if `merged`."""
        weights, *adapters = self._operands()
        if not merged:
            adapters = [None, None, [1.0]]
        out = torch.empty(self.count, dtype=torch.float32, device=self.device)
        shards.row_norms_([out], weights, *adapters, [1.0])
        return self.without_padding(out).double()

    def products(self, keys: list[Tensor]) -> Tensor:
        """<z, z>, <z, y> and <y, y> of every row's noises, float64 [3, rows]; [1, rows] of one.

        Of the whole weight on every rank: noise is made, not sent.
        """
        rows, cols = self._matrix_shape()
        groups = self.rows.columns or rows
        sums = torch.zeros(2 * len(keys) - 1, self.count, dtype=torch.float64, device=self.device)
        step = max(_PANEL // max(cols, 1), 1)
        length = rows // groups if self.rows.columns else rows
        for first in range(0, rows, length):
            for begin in range(first, first + length, step):
                count = min(step, first + length - begin)
                z = [ops.noise(count, cols, key, row_offset=begin).double() for key in keys]
                # Of one (z, z), of two (z, z), (z, y) and (y, y).
                pairs = itertools.combinations_with_replacement(z, 2)
                for k, (one, other) in enumerate(pairs):
                    if self.rows.columns:
                        own = (one * other).sum(0).view(-1, self.rows.width).sum(1)
                        part = sums[k].view(groups, -1)[first // length]
                        part += own
                    else:
                        sums[k, begin : begin + count] = torch.linalg.vecdot(one, other)
        return self.without_padding(sums)

    def _matrix_shape(self) -> tuple[int, int]:
        shape = self.shape
        if self.rows.stacked:
            return shape[:-1].numel(), shape[-1]
        return shape[0], shape[1:].numel()

    def shifted(self, held: Tensor, shift: Shift) -> Tensor:
        """W + e of what a module holds of the weight: all, or one rank's shard."""
        held = held.detach()
        if not shards.is_sharded(held):
            return self._shifted(held, shift, 0, 0)
        part = shards.part_of(held)
        row = part.row * held.shape[1] if self.rows.stacked else part.row
        return shards.like(self._shifted(part.local, shift, row, part.col), held)

    def _shifted(self, weight: Tensor, shift: Shift, row: int, col: int) -> Tensor:
        matrix = _dense(weight if weight.dim() else weight.view(1))
        if self.rows.columns:
            noisy = matrix.clone()
            noises = list(zip(shift.scales, shift.keys, strict=True))
            folded = noisy.view(self._matrix_shape())
            self.rows.perturb_columns_(folded, noises, elementwise=shift.elementwise)
            return noisy.view(weight.shape)
        matrix = self.rows.fold(matrix)
        scales = shift.scales[:, row : row + matrix.shape[0]].contiguous()
        place = {"row_offset": row, "col_offset": col}
        if len(scales) == 2:
            return ops.perturb_plane(matrix, scales, shift.keys, **place).view(weight.shape)
        place["elementwise"] = shift.elementwise
        return ops.perturb(matrix, scales[0], shift.keys[0], **place).view(weight.shape)

    def noise(self, shift: Shift, dtype: torch.dtype) -> Tensor:
        """e of a quantised weight [m, n], whose elements stay as they are stored."""
        if shift.elementwise:
            clean = self.quantized.dequantize(torch.float32).detach()
            return (self._shifted(clean, shift, 0, 0) - clean).to(dtype)
        zeros = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        return self._shifted(zeros, shift, 0, 0).to(dtype)


def _dense(weight: Tensor) -> Tensor:
    """As the ops take it: a copy only of what is laid out otherwise."""
    if weight.dim() == 2:
        rows, cols = weight.shape
        along = cols <= 1 or weight.stride(1) == 1
        if along and (rows <= 1 or weight.stride(0) >= cols):
            return weight
    return weight.contiguous()


def find_weights(
    op: str, model: nn.Module, scope: str | None, strategy: str = "row"
) -> list[Weight]:
    """The weights in scope, each tensor once; the model is clean, or a RuntimeError says why not.

    Args:
        op: who asks, for messages.
        model: any module.
        scope: as in `WeightNoise`; None: "merged" where the model has layers for that, else "full".
        strategy: whose scale they will have, which says what their rows are.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or nothing in scope.
        RuntimeError: a noise window is open, or a layer is merged.
    """
    _check.kinds(op, nn.Module, model=model)
    if scope is not None:
        _check.one_of(op, SCOPES, scope=scope)
    shards.reshard(model)
    targets, skipped = collect(op, model, scope or "merged", strategy)
    if scope is None and not targets:
        if any(number >= ADAPTERS for number in tensor_numbers(model).values()):
            raise ValueError(
                f"{op}: model has adapters, but no layer that shows its merged weight; call "
                "flatkern.integrations.peft.attach(model) first, or name a scope ('lora', 'full')"
            )
        targets, skipped = collect(op, model, "full", strategy)
    if not targets:
        hint = ""
        if scope == "merged":
            hint = (
                "; see flatkern.nn.replace_linear and flatkern.integrations.peft.attach, or take "
                "scope='full'"
            )
        raise ValueError(f"{op}: model must have weights in scope {scope!r}, got none{hint}")
    registry.require_free(op, targets)
    for target in targets:
        for site in target.layers:
            site.require_closed(op)
            if site.merged:
                raise RuntimeError(f"{op}: {target.name} is merged; call unmerge() first")
        if not shards.is_sharded(target.weight):
            continue
        shards.check(op, target.name, target.weight)
        if target.rows.columns:
            accepted = f"one whose rows are not columns where {target.name} is sharded"
            _check.refuse(op, "strategy", accepted, strategy)
    warn_of(op, skipped, stacklevel=3)
    taken: set[tuple[int, str]] = set()
    found = []
    for target in targets:
        places = target.owners
        if target.merged and len(target.layers) == 1:
            # Of layers that share a weight, each with a scale of its own.
            own = [place for place in places if place[0] is target.layers[0]]
            places = own or places
        places = [place for place in places if (id(place[0]), place[1]) not in taken]
        taken |= {(id(module), name) for module, name in places}
        if places:
            found.append(Weight(target, places))
    return found
