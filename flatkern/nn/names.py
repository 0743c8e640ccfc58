"""Names of modules and parameters as the unwrapped model has them.

`torch.compile`, activation checkpointing, DDP and others wrap a module in one of their own, whose
attribute for it (`_orig_mod`, `module`, ...) stands in every name below. What a wrapper is goes by
its type: a model's own submodule called `module` keeps its name.
"""

import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from torch import nn

# Where a wrapper's type is defined, its name, and under which attributes it has what it wraps.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", ("_orig_mod",)),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        ("_checkpoint_wrapped_module",),
    ),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", ("module",)),
    ("torch.nn.parallel.data_parallel", "DataParallel", ("module",)),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        ("_fsdp_wrapped_module",),
    ),
    ("torch.optim.swa_utils", "AveragedModel", ("module",)),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", ("module",)),
    ("lightning.fabric.wrappers", "_FabricModule", ("_forward_module", "_original_module")),
    ("lightning_fabric.wrappers", "_FabricModule", ("_forward_module", "_original_module")),
)


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` of the unwrapped model: (name, module), wrappers left out."""
    for name, module, is_wrapper in _walk(model, remove_duplicate):
        if not is_wrapper:
            yield name, module


def named_parameters(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` of the unwrapped model: (name, parameter), in the same order.

    A wrapper's own parameters (the flat ones of FSDP version 1) are named as if they were those of
    what it wraps.
    """
    seen = set()
    for prefix, module, _ in _walk(model, remove_duplicate):
        for own, value in module._parameters.items():
            if value is None or (remove_duplicate and id(value) in seen):
                continue
            seen.add(id(value))
            yield (f"{prefix}.{own}" if prefix else own), value


def hint(asked: str, names: Iterable[str]) -> str:
    """The end of an error about a name that ends none of these full ones: which may be meant."""
    names = list(names)
    depth = asked.count(".") + 1
    close = get_close_matches(asked, _ends(names, depth), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    ends = _ends(names, max(depth, 2))
    more = f" and {len(ends) - 8} more" if len(ends) > 8 else ""
    return f"there are {', '.join(ends[:8])}{more}" if ends else "there are none"


def _ends(names: list[str], depth: int) -> list[str]:
    """The last parts of dotted names; what many layers have is there once."""
    return list(dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names))


def _walk(model: nn.Module, remove_duplicate: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module, parents first, with its name in the unwrapped model and whether it wraps."""
    found = ((sys.modules.get(where), kind, inner) for where, kind, inner in _WRAPPERS)
    kinds = ((getattr(module, kind, None), inner) for module, kind, inner in found if module)
    # Types that nobody has imported have no instances.
    wrappers = [(kind, inner) for kind, inner in kinds if isinstance(kind, type)]
    # By the name with wrappers: the name without, and the attributes that add nothing to it.
    seen: dict[str, tuple[str, tuple[str, ...]]] = {}
    for raw, module in model.named_modules(remove_duplicate=remove_duplicate):
        parent, _, own = raw.rpartition(".")
        name, passed = seen.get(parent, (parent, ())) if raw else ("", ())
        if raw and own not in passed:
            name = f"{name}.{own}" if name else own
        inner = next((inner for kind, inner in wrappers if isinstance(module, kind)), ())
        seen[raw] = name, inner
        yield name, module, bool(inner)
