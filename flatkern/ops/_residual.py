"""What `flatkern.ops` checks of a residual, and the errors that follow from its header.

Each implementation compares the header with its call and keeps it; what it refuses stands there.
On CUDA `check_residual` reads it, so that no call waits for a copy to the host.
"""

import torch
from torch import Tensor

from flatkern import _backend
from flatkern.ops import _check
from flatkern.reference.header import (
    EMPTY,
    FILLED,
    REFUSALS,
    Header,
    layout_of,
    new_header,
    read,
    read_all,
)
from flatkern.reference.residual import HEADER_BYTES

__all__ = ["EMPTY", "FILLED", "Header", "layout_of", "new_header", "read", "read_all"]

# The other backends refuse a residual.
BACKENDS = ("cpu", "cuda", "reference")
_ALIGNMENT = 16
# The words of a header with clean, state, mismatched and refused.
_COUNTERS = slice(22, 26)
_STATES = {
    "filled": "was filled by an earlier perturb_ that was not restored; restore_ the weight first",
    "empty": "is empty: nothing was perturbed with it since the last restore_",
}


def check(op: str, residual: Tensor | None, weight: Tensor) -> None:
    """What can be said of fake tensors too: dtype, shape, device, size. None passes."""
    if residual is None:
        return
    least = layout_of(weight).pool_begin
    accepted = f"what new_residual(weight) returns: uint8 [{least} or more] on {weight.device}"
    if (
        residual.dtype != torch.uint8
        or residual.dim() != 1
        or not residual.is_contiguous()
        or residual.device != weight.device
        or residual.shape[0] < least
    ):
        _check.refuse(op, "residual", accepted, residual)


def check_backend(op: str, weight: Tensor) -> None:
    """Refuse a residual where the backend that serves the weight has none."""
    name = _backend.resolve(weight.device.type, weight.dtype)
    if name not in BACKENDS:
        raise ValueError(
            f"{op}: residual must be None on backend {name!r}; the backends with an exact "
            f"residual are {', '.join(BACKENDS[:-1])} and {BACKENDS[-1]}"
        )


def check_place(op: str, residual: Tensor, weight: Tensor) -> None:
    """Refuse a residual that no kernel could take; it has passed `check`."""
    check_backend(op, weight)
    pool_bytes = residual.numel() - layout_of(weight).pool_begin
    if residual.data_ptr() % _ALIGNMENT or pool_bytes % 4:
        _check.refuse(op, "residual", "as new_residual returned it, not a part of it", residual)


def in_kernels(weight: Tensor) -> bool:
    """Whether a call returns before its kernels ran; then `check_residual` reports refusals."""
    return _backend.resolve(weight.device.type, weight.dtype) == "cuda"


def header_of(residual: Tensor) -> Tensor:
    """A view of the header's bytes, for `all_done`."""
    return residual[:HEADER_BYTES]


def all_done(headers: list[Tensor], state: int) -> bool:
    """Whether headers on one device say that all is done, read with one copy to the host.

    FILLED: and every chunk found room. EMPTY: and every chunk is restored.
    """
    if not headers:
        return True
    words = torch.cat(headers).cpu().view(torch.int32).view(len(headers), -1)
    clean, now, mismatched, refused = words[:, _COUNTERS].unbind(1)
    wrong = (now - state) | mismatched | refused
    return not (wrong | clean if state == FILLED else wrong).any()


def raise_for(op: str, header: Header) -> None:
    """Refuse a perturbation or a restore that did not do all it should."""
    raise_refused(op, header)
    raise_mismatched(op, header)
    # Restored, nothing is missing any more.
    if header.clean and header.state == FILLED:
        raise RuntimeError(
            f"{op}: residual has no room for {header.clean} chunks, which were not perturbed: "
            f"they need pool_bytes={4 * header.asked}, it has {4 * header.capacity}"
        )


def raise_refused(op: str, header: Header) -> None:
    """Refuse what wrote nothing."""
    if not header.is_one:
        raise ValueError(f"{op}: residual must be what new_residual returns, got other bytes")
    names = [name for bit, name in enumerate(REFUSALS) if header.refused >> bit & 1]
    if not names:
        return
    if names[0] == "weight":
        raise ValueError(
            f"{op}: residual must be of this weight, got one made for a weight of another shape or "
            f"dtype, or a part of it: {header.made_for}"
        )
    if names[0] in _STATES:
        raise RuntimeError(f"{op}: residual {_STATES[names[0]]}; nothing was written")
    if names[0] == "implementation":
        raise RuntimeError(
            f"{op}: residual was filled by another backend, build or instruction set, whose noise "
            "may differ; restore under the one that perturbed"
        )
    raise RuntimeError(
        f"{op}: residual was filled with {', '.join(names)} other than those of the last call; "
        "nothing was written"
    )


def raise_mismatched(op: str, header: Header) -> None:
    """Refuse a restore that left chunks out."""
    if header.mismatched:
        raise RuntimeError(
            f"{op}: weight is not what perturb_ left: {header.mismatched} chunks of it differ from "
            "those that residual was filled for, and were left alone; all others are restored"
        )
