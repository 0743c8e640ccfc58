"""Steps below the resolution of 16-bit weights: added right on average, or told of."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from flatkern import ops
from flatkern.nn import shards
from flatkern.noise import NoiseKey

# Elements that are rounded at a time: their random words take 8 bytes each.
_PANEL = 2**20
# Below this share of elements that move, users are told.
_FEW = 0.5


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype may be larger than a small step by more than it resolves."""
    return dtype.is_floating_point and dtype.itemsize == 2


@torch.no_grad()
def add_(weight: Tensor, step: Tensor, key: NoiseKey) -> None:
    """weight += step, where a 16-bit weight is rounded up or down at random, right on average.

    To nearest, most of a small step would be lost: SAM's at rho = 0.05 moved 11 % of a bfloat16
    model's weights. Here the nearer neighbour is the likelier one, so that the mean of what is
    written is the exact sum. Words are those of `ops.philox_bits` at each element's place in the
    unsharded weight.

    Args:
        weight: of any shape, written in place.
        step: of its shape, float32 or wider.
        key: (seed, step, draw, tensor) of the words.
    """
    if not is_coarse(weight.dtype):
        weight.add_(step)
        return
    # The ops take nothing without dimensions.
    part = shards.part_of(weight if weight.dim() else weight.view(1))
    local = part.local
    added = (step.to_local() if shards.is_sharded(step) else step).view(local.shape)
    columns = local.shape[1:].numel()
    rows = max(_PANEL // max(columns, 1), 1)
    words_key = key.to(local.device)
    for begin in range(0, local.shape[0] if local.numel() else 0, rows):
        panel = local[begin : begin + rows]
        exact = panel.float() + added[begin : begin + rows]
        place = {"row_offset": part.row + begin, "col_offset": part.col}
        words = ops.philox_bits(panel.shape[0], columns, words_key, **place)
        panel.copy_(rounded_at_random(exact, words.view(panel.shape), local.dtype))


def rounded_at_random(value: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """One of the two neighbours in a 16-bit dtype, with the mean of the value; inf and NaN stay.

    Args:
        value: float32.
        words: int64 in [0, 2^32), one for each.
        dtype: bfloat16 or float16. Beyond its largest number that is taken.
    """
    nearest = value.to(dtype)
    # Bits of one sign grow with the magnitude.
    above = nearest.float().abs() > value.abs()
    low = nearest.view(torch.int16) - above.to(torch.int16)
    low, high = low.view(dtype), (low + 1).view(dtype)
    rest = value.abs() - low.float().abs()
    share = rest / (high.float().abs() - low.float().abs())
    return torch.where(words.double() * 2.0**-32 < share, high, low)


def tell_of_moved(op: str, weights: list[Tensor], before: list[Tensor], what: str) -> None:
    """Warn if few of the elements of 16-bit weights differ from what they were before."""
    pairs = [(w, b) for w, b in zip(weights, before, strict=True) if is_coarse(w.dtype)]
    moved = [(shards.part_of(w.detach()).local != b).sum().item() for w, b in pairs]
    _tell(op, sum(moved), sum(b.numel() for _, b in pairs), what)


def tell_of_noise(op: str, scaled: Iterable[tuple[Tensor, Tensor, bool]], what: str) -> None:
    """Warn if noise of these standard deviations would move few elements of 16-bit weights.

    Args:
        op, what: who warns, and of what.
        scaled: weights, the standard deviations of their rows, and whether those are relative to
            the elements.
    """
    moved, count = 0.0, 0
    for weight, c, elementwise in scaled:
        if is_coarse(weight.dtype) and weight.numel():
            # The first rows stand for all.
            values = weight.reshape(c.numel(), -1)
            rows = max(_PANEL // max(values.shape[1], 1), 1)
            values = values[:rows].abs()
            deviation = c[:rows, None] * (values.float() if elementwise else 1)
            ulp = (values.view(torch.int16) + 1).view(values.dtype).float() - values.float()
            likely = torch.erfc(ulp / 2 / (deviation * 2**0.5))
            moved += likely.nan_to_num().mean().item() * weight.numel()
            count += weight.numel()
    _tell(op, moved, count, what)


def _tell(op: str, moved: float, count: int, what: str) -> None:
    if count and moved < _FEW * count:
        warnings.warn(
            f"{op}: {what} moves {moved / count:.0%} of the elements of the 16-bit weights, whose "
            "resolution is coarser; float32 weights take it exactly",
            stacklevel=2,
        )
