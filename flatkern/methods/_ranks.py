"""The ranks that train one model together, each on batches of its own."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatkern.nn import shards


class Ranks:
    """Data-parallel ranks; told by the DDP modules or FSDP2 modules in a model.

    Gradients are means over the ranks. Whatever else a method takes from a rank's own batches
    passes through here, so that every rank computes with the same numbers. A model without such
    modules is one process's own, whatever process groups there are.

    Attributes:
        size, rank: of the ranks that differ in their batches; 1 and 0 without others.
        whole: whether each rank holds all weights, and so can see noise of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for what makes ranks of processes."""
        self._wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._groups = [self._wrappers[0].process_group] if self._wrappers else _fsdp_groups(model)
        self.whole = bool(self._wrappers) or not self._groups
        self.size, self.rank = 1, 0
        for group in self._groups:
            self.rank = self.rank * group.size() + group.rank()
            self.size *= group.size()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks; they all call this, in the same order."""
        if self.size == 1:
            return value
        value = value.detach().clone(memory_format=torch.contiguous_format)
        for group in self._groups:
            torch.distributed.all_reduce(value, group=group)
        return value.div_(self.size)

    def largest(self, value: Tensor) -> Tensor:
        """The largest of every element of a tensor over the ranks."""
        value = value.clone()
        for group in self._groups:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=group)
        return value

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let every `.grad` be its mean over the ranks; a rank that has none counts as 0.

        For backwards inside `alone`, of which a rank may run none.
        """
        if self.size == 1:
            return
        own = [0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in parameters]
        kinds = self.largest(torch.tensor(own, device=parameters[0].device)).tolist()
        for p, kind in zip(parameters, kinds, strict=True):
            if kind:
                grad = torch.zeros_like(p) if p.grad is None else dense(p.grad)
                grad = self.mean(grad)
                p.grad = grad.to_sparse(1) if kind == 2 else grad

    @contextlib.contextmanager
    def alone(self, apart: bool = True) -> Iterator[None]:
        """Backwards inside add to the rank's own gradients: DDP's ranks share them later."""
        with contextlib.ExitStack() as stack:
            for wrapper in self._wrappers if apart else ():
                stack.enter_context(wrapper.no_sync())
            yield

    @contextlib.contextmanager
    def checked(self, op: str, model: nn.Module) -> Iterator[None]:
        """RuntimeError if a forward comes through a DDP module that `model` does not contain."""
        if self._groups or not torch.distributed.is_available():
            yield
            return
        if not torch.distributed.is_initialized():
            yield
            return

        def refuse(*_: object) -> None:
            if DistributedDataParallel._get_active_ddp_module() is not None:
                raise RuntimeError(
                    f"{op}: model must be the DistributedDataParallel module that loss_fn calls, "
                    "got what is inside it: the ranks would not know of each other's batches"
                )

        handle = model.register_forward_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()


def dense(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor: embeddings may have sparse ones."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def laid_out(gradient: Tensor, sparse: bool) -> Tensor:
    """An ordinary tensor in the layout that the optimizer expects of an embedding's gradient."""
    return gradient.to_sparse(1) if sparse else gradient


def _fsdp_groups(model: nn.Module) -> list:
    """The groups over which FSDP2 takes means of gradients, outer ones first."""
    for part in shards.fsdp_modules(model):
        for group in shards.fsdp_groups(part):
            info = group.mesh_info
            names = ("replicate_process_group", "shard_process_group")
            return [getattr(info, name) for name in names if hasattr(info, name)]
    return []
