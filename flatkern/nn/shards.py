"""Weights that torch.distributed has cut into shards (DTensors, by FSDP2 or tensor parallelism).

An element's noise depends on its place in the whole weight, so a rank makes that of its own part
from the part's offsets, without a word to the others. Only norms of rows go over the wire.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatkern import ops
from flatkern._noise import Noise
from flatkern.ops._library import as_matrix
from flatkern.ops.noisy_linear import call_noisy_linear

# Elements of a float64 panel of merged columns: 8 MiB.
_PANEL = 2**20


class Part(NamedTuple):
    """What this rank holds of a weight seen as dim0 x rest.

    Attributes:
        local: the elements, in the weight's own memory.
        row, col: where they begin.
    """

    local: Tensor
    row: int
    col: int

    def rows_of(self, values: Tensor) -> Tensor:
        """Of one value for every row of the weight those of its own rows, in place."""
        return values[self.row : self.row + self.local.shape[0]]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Where nothing imported their module there are none, and importing flatkern must not.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check(op: str, name: str, weight: Tensor) -> None:
    """ValueError unless every rank holds a block of rows or of columns, or a copy.

    Columns only of a matrix: those of other shapes are not one block of dim0 x rest.
    """
    if not is_sharded(weight):
        return
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    cuts = {0: 1, 1: 1} if weight.dim() == 2 else {0: 1}
    fine = True
    for placement, size in zip(weight.placements, weight.device_mesh.shape, strict=True):
        if isinstance(placement, Shard | _StridedShard) and placement.dim in cuts:
            cuts[placement.dim] *= size
        else:
            fine = fine and isinstance(placement, Replicate)
    # FSDP over tensor parallelism: one block of rows only if all are of one size.
    for placement in weight.placements:
        if isinstance(placement, _StridedShard) and fine:
            fine = weight.shape[placement.dim] % cuts[placement.dim] == 0
    if not fine:
        raise ValueError(
            f"{op}: {name} must be sharded in blocks of rows (Shard(0)) or, a matrix, of columns "
            f"(Shard(1)), or replicated, got {weight.placements} of {list(weight.shape)} on a mesh "
            f"of {list(weight.device_mesh.shape)}"
        )


def are_even(weight: Tensor) -> bool:
    """Whether the shards of a weight that passed `check` are of one size."""
    sizes = zip(weight.placements, weight.device_mesh.shape, strict=True)
    cut = math.prod(size for placement, size in sizes if not placement.is_replicate())
    return weight.shape[0] % cut == 0


def part_of(weight: Tensor) -> Part:
    """This rank's part of a weight that passed `check`; of a plain tensor all of it."""
    if not is_sharded(weight):
        return Part(weight, 0, 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    place = weight.shape, weight.device_mesh, weight.placements
    _, offset = compute_local_shape_and_global_offset(*place)
    return Part(weight.to_local(), offset[0], offset[1] if len(offset) == 2 else 0)


def like(local: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded as `weight` is."""
    if not is_sharded(weight):
        return local.view(weight.shape)
    from torch.distributed.tensor import DTensor

    place = weight.device_mesh, weight.placements
    size = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(local, *place, run_check=False, **size)


def row_norms_(
    out: list[Tensor],
    weights: list[Tensor],
    lora_As: list[Tensor] | None,
    lora_Bs: list[Tensor] | None,
    scalings: list[float],
    factors: list[float],
) -> None:
    """Write `row_norms`, times a factor for each weight, into `out`; of one device and backend.

    A [k, r, n] and B [k, m, r] are those of k matrices, which lie below one another in a weight
    [k m, n].
    """
    operands = weights, lora_As, lora_Bs
    if not any(map(is_sharded, itertools.chain(*(part or () for part in operands)))):
        if lora_As is not None and any(lora_A.dim() == 3 for lora_A in lora_As):
            lists = _unstacked(out, weights, lora_As, lora_Bs, scalings, factors)
            row_norms_(*lists)
            return
        matrices = [as_matrix(weight) for weight in weights]
        lists = matrices, lora_As, lora_Bs, scalings
        ops.foreach_row_norm(*lists, factors=factors, out=out, checked=True)
        return
    detached = ([part.detach() for part in parts] if parts else None for parts in operands)
    norms = row_norms(*detached, scalings)
    torch._foreach_copy_(out, torch._foreach_mul(norms, factors))


def _unstacked(*lists: list[Any]) -> tuple[list[Any], ...]:
    """The operands of `row_norms_` with every matrix of a stack apart."""
    apart: list[tuple[Any, ...]] = []
    for out, weight, lora_A, lora_B, *rest in zip(*lists, strict=True):
        if lora_A.dim() == 2:
            apart.append((out, weight, lora_A, lora_B, *rest))
            continue
        k = lora_A.shape[0]
        matrices = weight.reshape(k, -1, weight.shape[-1])
        parts = zip(out.view(k, -1), matrices, lora_A, lora_B, strict=True)
        apart += [(*part, *rest) for part in parts]
    return tuple(map(list, zip(*apart, strict=True)))


def row_norms(
    weights: list[Tensor],
    lora_As: list[Tensor] | None,
    lora_Bs: list[Tensor] | None,
    scalings: list[float],
) -> list[Tensor]:
    """`ops.foreach_row_norm` of the whole weights, the same on every rank, float32 [m].

    Collective where a weight is sharded. A row that lies on one rank has the bits of the unsharded
    norm. Of a row that several ranks share, each sums the squares in float64.
    """
    # Also without shards: an adapter may be sharded where its weight is not.
    parts = [part_of(weight) for weight in weights]
    own_As, own_Bs = (None, None) if lora_As is None else ([], [])
    matrices = [as_matrix(part.local) for part in parts]
    for part, matrix, lora_A, lora_B in zip(
        parts, matrices, lora_As or (), lora_Bs or (), strict=False
    ):
        own_A, own_B = _cut(part, matrix, whole(lora_A), whole(lora_B))
        own_As.append(own_A)
        own_Bs.append(own_B)
    full = [i for i, matrix in enumerate(matrices) if matrix.shape[1] == _cols(weights[i])]
    norms = {i: matrices[i].new_empty(len(matrices[i]), dtype=torch.float32) for i in full}
    row_norms_(
        [norms[i] for i in full],
        [matrices[i] for i in full],
        None if own_As is None else [own_As[i] for i in full],
        None if own_Bs is None else [own_Bs[i] for i in full],
        [scalings[i] for i in full],
        [1.0] * len(full),
    )
    sums: dict[tuple, dict[int, Tensor]] = {}
    for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        if not (groups := _groups(weight)):
            continue
        # The square of a float32 is exact in float64, and so is the root of that square.
        own = norms[i].double().square() if i in norms else None
        if own is None:
            adapters = (None, None) if own_As is None else (own_As[i], own_Bs[i])
            own = _squares(matrices[i], *adapters, scalings[i])
        every = own.new_zeros(weight.shape[0])
        part.rows_of(every).copy_(own)
        sums.setdefault(groups, {})[i] = every
    for groups, squares in sums.items():
        total = torch.cat(list(squares.values()))
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        sizes = [len(square) for square in squares.values()]
        norms |= zip(squares, total.sqrt().float().split(sizes), strict=True)
    return [norms[i] for i in range(len(weights))]


def _cut(part: Part, matrix: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """What of A and B is about a part: its columns and rows, or its matrices of a stack."""
    rows, cols = matrix.shape
    if lora_A.dim() == 2:
        return lora_A[:, part.col : part.col + cols], lora_B[part.row : part.row + rows]
    m = lora_B.shape[1]
    own = slice(part.row // m, (part.row + rows) // m)
    return lora_A[own], lora_B[own]


def _cols(weight: Tensor) -> int:
    return weight.shape[1:].numel()


def whole(tensor: Tensor) -> Tensor:
    """All of it on this rank; collective where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _groups(weight: Tensor) -> tuple:
    """The process groups over which it is cut; ranks that hold copies are in none of them."""
    if not is_sharded(weight):
        return ()
    dims = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    return tuple(weight.device_mesh.get_group(i) for i in dims)


def _squares(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> Tensor:
    """The squared norms of the rows of W + s B A, float64 [m], in panels of bounded size."""
    rows, cols = weight.shape
    step = max(_PANEL // max(cols, 1), 1)
    sums = torch.empty(rows, dtype=torch.float64, device=weight.device)
    wide_A = None if lora_A is None else lora_A.double()
    for begin in range(0, rows, step):
        panel = weight[begin : begin + step].double()
        if wide_A is not None:
            panel.addmm_(lora_B[begin : begin + step].double(), wide_A, alpha=scaling)
        sums[begin : begin + step] = panel.square().sum(1)
    return sums


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    noise: Noise,
    **options: Any,
) -> Tensor:
    """`call_noisy_linear` of a weight that may be cut into shards in this forward.

    Tensor parallelism: of rows, each rank returns its features; of columns, its term of the sum,
    the first rank's with the bias.

    Args:
        x: a DTensor if the weight is.
        noise: of the whole weight.
        The others are those of the op.
    """
    if not is_sharded(weight):
        # FSDP gathers the weight for the forward, and again for the backward.
        return call_noisy_linear(x, weight, bias, lora_A, lora_B, scaling, noise, **options)
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements
    if not is_sharded(x) or mesh.ndim != 1:
        raise ValueError(
            "noisy_linear: x must be a DTensor and weight lie on a mesh of one dimension, got "
            f"{type(x).__name__} and {placements}; see flatkern.integrations.distributed"
        )
    part = part_of(weight.detach())
    by_rows, by_cols = (placements[0].is_shard(dim) for dim in (0, 1))
    last = x.dim() - 1

    def own(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """This rank's part, of all if `dim` is None: then its gradient is a term of a sum."""
        if tensor is None:
            return None
        placement = Replicate() if dim is None else Shard(dim)
        shared = dim is None and (by_rows or by_cols)
        local = tensor.redistribute(mesh, [placement])
        return local.to_local(grad_placements=[Partial() if shared else placement])

    own_bias = own(bias, 0 if by_rows else None)
    if own_bias is not None and by_cols and mesh.get_local_rank() > 0:
        own_bias = own_bias * 0
    y = call_noisy_linear(
        own(x, last if by_cols else None),
        weight.to_local(),
        own_bias,
        own(lora_A, 1 if by_cols else None),
        own(lora_B, 0 if by_rows else None),
        scaling,
        noise.part(part.row, part.local.shape[0], part.col),
        **options,
    )
    placement = Shard(last) if by_rows else Partial() if by_cols else Replicate()
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=stride)


def reshard(model: nn.Module) -> None:
    """Let FSDP drop what it has gathered, which may show other noise than the shards."""
    for part in fsdp_modules(model):
        # reshard() leaves gathered what an exception interrupted in its forward.
        for group in fsdp_groups(part):
            group._to_sharded()


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that FSDP2 shards, outer ones first."""
    module = sys.modules.get("torch.distributed.fsdp")
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    # PEFT imports it without need, and every window would walk through the model.
    if module is None or not has_ranks:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            yield part


def fsdp_groups(part: Any) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together for a module of its own."""
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]
