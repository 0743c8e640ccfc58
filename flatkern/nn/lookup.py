"""Embeddings that see the rows of a batch's tokens alone, noisy or adapted, for one call."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatkern import _backend, ops
from flatkern.nn.shown import can_wait, shadowing, whole_weight


def looks_up(module: nn.Module, name: str, ids: Any) -> bool:
    """Whether a module's call with these ids reads those rows of its weight, which it can be told.

    Others than nn.Embedding and scaled ones look up something else (positions, say).
    """
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    fits = isinstance(module, nn.Embedding) and name == "weight" and plain
    return fits and isinstance(ids, Tensor) and can_wait(ids)


@contextlib.contextmanager
def looking_up(
    window: Any | None,
    module: nn.Embedding,
    ids: Tensor,
    then: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """`module.weight` is the rows that `ids` name, once each; yields where among them these are.

    The weight itself gets no gradient. Those of `then` keep to padding_idx and
    scale_grad_by_freq.

    Args:
        window: the `State` of the weight in the open window; None: no noise.
        module: that `looks_up`.
        ids: integers of any shape.
        then: called with rows [k, n] of the weight and their int64 indices [k].
    """
    weight = whole_weight(module, "weight")
    if window is not None:
        window.mark_called()
    tokens, places = ids.unique(return_inverse=True)
    indices = tokens.tolist()
    rows = _rows(window, weight, tokens, indices)
    if then is not None:
        rows = then(rows, tokens)
    padding, sparse = module.padding_idx, module.sparse
    module.padding_idx = indices.index(padding) if padding in indices else None
    module.sparse = False
    try:
        with shadowing(module, "weight", rows):
            yield places
    finally:
        module.padding_idx, module.sparse = padding, sparse


@torch.no_grad()
def _rows(window: Any | None, weight: Tensor, tokens: Tensor, indices: list[int]) -> Tensor:
    """W_noisy[tokens]; no other noise is made."""
    rows = F.embedding(tokens, weight)  # IndexError of a negative id, too
    if window is None or not indices:
        return rows
    with _backend.backend(window.backend):
        ops.foreach_perturb_(
            [*rows.split(1)],
            [*window.row_scale[tokens].split(1)],
            [window.key] * len(indices),
            elementwise=window.elementwise,
            row_offsets=indices,
            checked=True,
        )
    return rows
