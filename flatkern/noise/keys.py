"""The address of a noise draw."""

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from flatkern._version import NOISE_VERSION
from flatkern.ops import _check

RANKS = ("same", "independent")
_DRAWS = 2**16


@dataclass(frozen=True)
class NoiseKey:
    """(seed, step, draw, tensor), each an int in [0, 2^32): the noise of one weight in one draw.

    Raises:
        TypeError, ValueError: a word that is not an int, or out of range.
    """

    seed: int
    step: int = 0
    draw: int = 0
    tensor: int = 0

    def __post_init__(self) -> None:
        check_words("NoiseKey", **vars(self))

    def to(self, device: torch.device | str) -> Tensor:
        """The int64 [4] tensor that the ops take."""
        return torch.tensor(astuple(self), dtype=torch.int64, device=device)


def check_words(op: str, **words: int) -> None:
    """TypeError or ValueError, in the name of `op`, unless each is an int in [0, 2^32)."""
    for argument, word in words.items():
        if not isinstance(word, int) or isinstance(word, bool):
            raise TypeError(f"{op}: {argument} must be int, got {type(word).__name__}")
        if not 0 <= word < 2**32:
            raise ValueError(f"{op}: {argument} must be in [0, 2**32), got {word}")


def check_version(op: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A `state_dict` without its "noise_version"; those of before there was one have the first.

    Raises:
        ValueError: this version of flatkern makes other noise than the one that saved it.
    """
    rest = dict(state_dict)
    version = rest.pop("noise_version", 1)
    if version != NOISE_VERSION:
        raise ValueError(
            f"{op}: state_dict's noise_version must be {NOISE_VERSION}, got {version!r}: a run "
            "that goes on here would see other noise; use the flatkern that saved it"
        )
    return rest


def draw_word(op: str, draw: int, ranks: str) -> int:
    """rank * 2^16 + draw, with rank 0 where all ranks see the same noise.

    Raises:
        TypeError, ValueError: `draw` is not an int in [0, 2^16).
    """
    _check.kinds(op, int, draw=draw)
    if not 0 <= draw < _DRAWS:
        _check.refuse(op, "draw", f"in [0, {_DRAWS})", draw)
    independent = ranks == "independent" and torch.distributed.is_available()
    if independent and torch.distributed.is_initialized():
        return torch.distributed.get_rank() * _DRAWS + draw
    return draw
