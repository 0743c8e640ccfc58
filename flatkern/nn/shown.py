"""Weights that a module sees through noise for the length of one call.

For layers whose product no op of ours makes: convolutions, embeddings, transposed weights, stacked
experts. The noisy weight is made for the call and dropped after it. What autograd would keep of it
is made again in backward, from the key.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from flatkern import _backend, ops

# What is done with (a part of) the noisy weight before a module sees it; the part is a range of
# dim 0.
Then = Callable[[Tensor, slice], Tensor]


@contextlib.contextmanager
def showing(
    window: Any | None,
    module: nn.Module,
    name: str,
    *,
    only: list[int] | None = None,
    then: Then | None = None,
) -> Iterator[None]:
    """`module.name` is its weight as the window shows it, and the parameter again afterwards.

    Gradients flow to the weight, if it asks for one, and through `then`. A backward after the
    window raises, as one through `flatkern.ops.noisy_linear` does.

    Args:
        window: the `State` of the weight in the open window; None: no noise.
        module, name: the parameter, not sharded; its dim 0 is that of the noise's matrix.
        only: the indices of dim 0 that the call reads, in order; the others are zeros and cost
            nothing. None: all.
        then: called with the noisy weight and slice(0, its length); in backward also with parts.
    """
    weight = whole_weight(module, name)
    if window is not None:
        window.mark_called()
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        # Neither traces what autograd keeps.
        hooks: Any = contextlib.nullcontext()
        shown = _traced(window, weight)
        shown = shown if then is None else then(shown, slice(0, weight.shape[0]))
    else:
        recipe = _Recipe(window, weight, only, then)
        shown = recipe.make()
        hooks = _forgetting(shown, recipe)
    with hooks, shadowing(module, name, shown):
        yield


def whole_weight(module: nn.Module, name: str) -> Tensor:
    """The parameter in its module's forward; TypeError if this rank has a part of it only."""
    weight = module._parameters[name]
    if hasattr(weight, "device_mesh"):
        raise TypeError(
            f"flatkern: {name} must be whole in the forward of a {type(module).__name__}, as FSDP2 "
            f"makes it, got a DTensor {weight.placements}; tensor parallelism serves linear layers"
        )
    return weight


@contextlib.contextmanager
def shadowing(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """`module.name` is `value`; its parameters and state_dict stay what they are."""
    # An attribute of the instance comes before nn.Module.__getattr__, which finds parameters. One
    # that is there already is that of a call around this one.
    outer = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if outer is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = outer


def can_wait(tensor: Tensor) -> bool:
    """Whether the host may look inside a tensor at this time."""
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def noisy_part(
    window: Any | None, weight: Tensor, part: slice, only: list[int] | None = None
) -> Tensor:
    """W_noisy[part] of dim 0, outside autograd; with `only`, zeros but at those indices."""
    if window is None:
        return weight.detach()[part]
    rows, weight = window.target.rows, weight.detach()
    begin, end = part.start, part.stop
    per = weight.shape[1] if rows.stacked else 1
    options = {"elementwise": window.elementwise}
    with _backend.backend(window.backend):
        if only is None:
            here, places = weight[begin:end], [(begin, end)]
        else:
            here = torch.zeros_like(weight[begin:end])
            places = _runs([index for index in only if begin <= index < end])
        if only is None and not rows.columns:
            scale = window.row_scale[begin * per : end * per]
            matrix = _matrix(here, per)
            noisy = ops.perturb(matrix, scale, window.key, row_offset=begin * per, **options)
            return noisy.view(here.shape)
        out = here.clone() if only is None else here
        parts, scales, offsets = [], [], []
        for first, last in places:
            own = out[first - begin : last - begin]
            if only is not None:
                own.copy_(weight[first:last])
            parts.append(_matrix(own, per))
            scales.append(window.row_scale[first * per : last * per])
            offsets.append(first * per)
        if rows.columns:
            total = weight.shape[0] * per
            for matrix, first in zip(parts, offsets, strict=True):
                where = {"first": first, "total": total}
                noises = [(window.row_scale, window.key)]
                rows.perturb_columns_(matrix, noises, **where, **options)
        elif parts:
            keys = [window.key] * len(parts)
            ops.foreach_perturb_(parts, scales, keys, row_offsets=offsets, checked=True, **options)
        return out


def _matrix(weight: Tensor, per: int) -> Tensor:
    """As the matrix that noise sees, `per` rows for each index of dim 0."""
    return weight.reshape(weight.shape[0] * per, -1)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Neighbours among sorted indices together, as ranges."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    return runs


def _traced(window: Any | None, weight: Tensor) -> Tensor:
    """W_noisy in operations that compilers and torch.func can follow."""
    if window is None:
        return weight
    rows = window.target.rows
    per = weight.shape[1] if rows.stacked else 1
    if not rows.columns:
        options = {"elementwise": window.elementwise}
        flat = _matrix(weight, per)
        return ops.perturb(flat, window.row_scale, window.key, **options).view(weight.shape)
    matrix = _matrix(weight, per)
    noises = [(window.row_scale, window.key)]
    return rows.perturbed_columns(matrix, noises, window.elementwise).view(weight.shape)


class _Noisy(torch.autograd.Function):
    """The noisy weight, whose gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, recipe: "_Recipe") -> Tensor:
        ctx.dtype = weight.dtype
        return noisy_part(recipe.window, weight, slice(0, weight.shape[0]), recipe.only)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Recipe:
    """How to make a shown weight, or a part of it, once more."""

    def __init__(
        self, window: Any | None, weight: Tensor, only: list[int] | None, then: Then | None
    ) -> None:
        self.window, self.only = window, only
        self._weight, self._then = weight, then
        # By the time of backward another window may be open, with other noise at the same place.
        sources = (weight,) if window is None else (weight, window.key)
        self._sources = [(t, t._version) for t in sources if not t.is_inference()]

    def make(self) -> Tensor:
        """All of it, differentiable."""
        noisy = self._weight if self.window is None else _Noisy.apply(self._weight, self)
        return noisy if self._then is None else self._then(noisy, slice(0, noisy.shape[0]))

    @torch.no_grad()
    def remake(self, part: slice) -> Tensor:
        """The same bits of a range of dim 0."""
        if any(tensor._version != version for tensor, version in self._sources):
            name = "a weight" if self.window is None else self.window.target.name
            raise RuntimeError(
                f"flatkern: backward through {name} after the noise window of its "
                "forward was closed, or after something that it needs was written; call backward "
                "inside the window"
            )
        noisy = noisy_part(self.window, self._weight, part, self.only)
        return noisy if self._then is None else self._then(noisy, part)


class _View(NamedTuple):
    """A part of a shown weight that autograd asked to keep."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    # Of dim 0 of the whole weight.
    step: int

    def remade(self) -> Tensor:
        """Its elements, from no more of the weight than they are in."""
        reach = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        part = slice(self.offset // self.step, (self.offset + reach) // self.step + 1)
        made = self.recipe.remake(part)
        return made.as_strided(self.size, self.stride, self.offset - part.start * self.step)


class _Kept(NamedTuple):
    """Another tensor that autograd asked to keep, and what would have kept it without us."""

    value: Any
    unpack: Callable[[Any], Tensor] | None
    version: int | None


def _forgetting(shown: Tensor, recipe: _Recipe) -> Any:
    """What autograd keeps of `shown` inside is the recipe; of all else, what it kept anyway."""
    storage, dtype = shown.untyped_storage().data_ptr(), shown.dtype
    contiguous, step = shown.is_contiguous(), max(shown[:1].numel(), 1)
    # Activation checkpointing and offloading have hooks of their own, and only the innermost
    # are asked.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> _View | _Kept:
        own = tensor.untyped_storage().data_ptr() == storage and tensor.dtype == dtype
        if own and contiguous and tensor.numel():
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            return _View(recipe, *place, step)
        if outer is not None:
            return _Kept(outer[0](tensor), outer[1], None)
        return _Kept(tensor, None, None if tensor.is_inference() else tensor._version)

    def unpack(kept: _View | _Kept) -> Tensor:
        if isinstance(kept, _View):
            return kept.remade()
        if kept.unpack is not None:
            return kept.unpack(kept.value)
        if kept.version is not None and kept.value._version != kept.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor {list(kept.value.shape)}, at version "
                f"{kept.value._version}, expected {kept.version}"
            )
        return kept.value

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
