"""Scopes: which weights of a model take noise, and what their scale is taken from."""

import warnings

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flatkern.nn import shards
from flatkern.nn.names import named_modules, named_parameters
from flatkern.nn.sites import Site, site_of
from flatkern.noise.fisher import Fisher
from flatkern.noise.numbers import ADAPTERS, tensor_numbers
from flatkern.noise.rows import rows_of
from flatkern.noise.targets import Target
from flatkern.noise.whole import require_whole
from flatkern.ops import _check

SCOPES = ("merged", "origin", "lora", "full", "all", "trainable")
# Strategies whose scale is that of no weight: layers over one weight need no scale each.
_ALIKE = ("gaussian", "element")


def collect(
    op: str,
    model: nn.Module,
    scope: str,
    strategy: str,
    restore: str | None = None,
    fisher: Fisher | None = None,
) -> tuple[list[Target], dict[str, str]]:
    """The weights in scope, each tensor once, in the model's order; and why others are left out.

    - merged: the base weights of sites (LoRALinear and attached layers), with the scale of
      W' = W + s B A;
    - origin: every tensor but the adapters; lora: the adapters; full: both; trainable: every
      trainable parameter; each with the scale of its own values;
    - all: as merged, and with "element" every other tensor, adapters excepted.

    A weight that several sites share with scales of their own is there once for each of them.
    Tensors that are not real floating-point numbers are left out, and so are quantised ones but
    those of sites: by name in the second result.

    Raises:
        ValueError: a tensor in scope stands for a weight that its module does not hold, see
            `require_whole`.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    layers: dict[int, list[Site]] = {}
    skipped: dict[str, str] = {}
    _refuse_flat(op, model)
    numbers = tensor_numbers(model)
    modules, parameters = list(named_modules(model)), list(named_parameters(model))
    # Not listed once more: PEFT's MultiheadAttention makes new parameters whenever it is.
    for name, module in modules:
        for own, weight in module._parameters.items():
            if weight is not None:
                owners.setdefault(id(weight), []).append((module, own))
        site = site_of(module)
        if site is not None and site.weight is not None:
            layers.setdefault(id(site.weight), []).append(site)
            if not isinstance(site.weight, nn.Parameter) and scope != "lora":
                skipped[name or type(module).__name__] = "its weight is not a parameter"
    targets = []
    for name, weight in parameters:
        base, is_adapter = layers.get(id(weight), []), numbers[name] >= ADAPTERS
        merged = bool(base) and scope in ("merged", "all")
        chosen = (
            merged
            or {
                "merged": False,
                "origin": not is_adapter,
                "lora": is_adapter,
                "full": True,
                "all": not is_adapter,
                "trainable": weight.requires_grad,
            }[scope]
        )
        if not chosen:
            continue
        require_whole(op, name, weight)
        reason = None if base else why_no_elements(weight)
        reason = reason or next(filter(None, map(_why_written, owners[id(weight)])), None)
        if reason is not None:
            skipped[name] = reason
            continue
        own = "element" if scope == "all" and not merged else strategy
        rows = rows_of(*owners[id(weight)][0], weight, own, merged)
        for site in base if merged else ():
            for part, adapter in site.adapters().items():
                require_whole(op, f"{part} of {name}", adapter)
        apart = merged and len(base) > 1 and own not in _ALIKE
        for sites in [[site] for site in base] if apart else [base]:
            found = name, numbers[name], sites, owners[id(weight)], own, merged, rows
            targets.append(Target(*found, restore, fisher))
    return targets, skipped


def warn_of(op: str, skipped: dict[str, str], stacklevel: int) -> None:
    """UserWarning that names what takes no noise; plain integers are nobody's weights."""
    named = [f"{name} ({why})" for name, why in skipped.items() if why not in _INTEGERS]
    if named:
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        warnings.warn(f"{op}: no noise on {', '.join(named[:8])}{more}", stacklevel=stacklevel + 1)


_INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")


def why_no_elements(weight: Tensor) -> str | None:
    """Why a tensor takes no noise, if it is something else than real floating-point numbers."""
    dtype = str(weight.dtype).removeprefix("torch.")
    if is_traceable_wrapper_subclass(weight) and not shards.is_sharded(weight):
        return f"a {type(weight).__name__}"
    if weight.dtype in _check.FLOAT_DTYPES:
        return None
    # bitsandbytes keeps quantised weights as integers of a kind of their own.
    return dtype if type(weight) is nn.Parameter else f"a {type(weight).__name__} of {dtype}"


def _why_written(owner: tuple[nn.Module, str]) -> str | None:
    """Why a window could not restore a parameter of this module."""
    module, name = owner
    if isinstance(module, nn.Embedding) and name == "weight" and module.max_norm is not None:
        return "an embedding with max_norm, which writes its weight in every forward"
    return None


def _refuse_flat(op: str, model: nn.Module) -> None:
    """FSDP version 1 takes the weights out of their modules: no scope would find them."""
    for name, parameter in named_parameters(model):
        if getattr(parameter, "_is_flat_param", False):
            prefix = name.rpartition(".")[0]
            inside = getattr(parameter, "_fqns", None) or [name.rpartition(".")[2]]
            names = [f"{prefix}.{own}" if prefix else own for own in inside]
            require_whole(op, ", ".join(names[:8]), parameter)
