"""Adapters on parameters in PEFT's format: one layer around another for those of one module."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.layouts import is_stack
from flatkern.nn.merging import Mergeable
from flatkern.nn.names import hint, named_modules
from flatkern.nn.parameters import (
    LoRAParameter,
    adapt,
    adapter_on,
    check_parameter,
    is_called,
)
from flatkern.nn.saved import PREFIX, matches
from flatkern.ops import _check

_INSIDE = ".base_layer"


def find_parameters(model: nn.Module) -> dict[str, LoRAParameter]:
    """The model's adapters on parameters, by the parameter's full name, in the model's order."""
    # One that is used in several places counts once.
    return {
        f"{name}.{own}" if name else own: adapter
        for name, module in named_modules(model)
        for own in module._parameters
        if (adapter := adapter_on(module, own)) is not None
    }


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """What PEFT calls the layer of each parameter; the module's first is the innermost."""
    by_module: dict[str, list[str]] = {}
    for full in names:
        by_module.setdefault(full.rpartition(".")[0], []).append(full)
    return {
        full: module + _INSIDE * (len(own) - 1 - i)
        for module, own in by_module.items()
        for i, full in enumerate(own)
    }


def tensors_of(op: str, adapters: dict[str, LoRAParameter]) -> dict[str, Tensor]:
    """The file's tensors, without its prefix.

    Raises:
        ValueError: one that the format has no place for: filters.

    Warns:
        UserWarning: one that PEFT would not use, of an attention's out_proj.
    """
    unseen = [full for full, own in adapters.items() if not is_called(own.holder)]
    if unseen:
        warnings.warn(
            f"{op}: PEFT has no place for adapters on {', '.join(unseen[:8])}, which attention "
            "reads and does not call; flatkern's load_adapter reads them",
            stacklevel=3,
        )
    tensors = {}
    for full, key in keys_of(adapters).items():
        adapter = adapters[full]
        if adapter.weight.dim() > 2 and adapter.lora_A.dim() == 2:
            raise ValueError(
                f"{op}: model must have adapters of matrices and stacks, got one on the filters "
                f"{full}, for which the format has no place; keep the model's state_dict"
            )
        lora_A, lora_B = _turned(adapter, adapter.lora_A.detach(), adapter.lora_B.detach())
        if lora_A.dim() == 3:
            lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
        tensors[f"{key}.lora_A.weight"] = lora_A.contiguous()
        tensors[f"{key}.lora_B.weight"] = lora_B.contiguous()
    return tensors


def _turned(adapter: LoRAParameter, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """From A over inputs to PEFT's A, and back: that is over the last dimension of the parameter.

    Or over the second, of a module that says `is_transposed`.
    """
    said = adapter.weight.dim() == 3 and getattr(adapter.holder, "is_transposed", False)
    if (not said) == adapter.is_transposed():
        return lora_B.mT, lora_A.mT
    return lora_A, lora_B


def parameters_named(
    op: str, argument: str, model: nn.Module, names: Iterable[str]
) -> dict[str, tuple[nn.Module, str]]:
    """(module, parameter) by full name, of those that are named exactly or by a dotted suffix."""
    _check.kinds(op, (list, tuple, set, frozenset), **{argument: names})
    own = {
        f"{name}.{own}" if name else own: (module, own)
        for name, module in named_modules(model)
        for own, value in module._parameters.items()
        if value is not None
    }
    for name in names:
        _check.kinds(op, str, **{argument: name})
        if not any(matches(full, name) for full in own):
            fitting = (full for full, place in own.items() if _may_be_adapted(*place))
            raise ValueError(
                f"{op}: {argument} must be names of parameters of the model, got {name!r}, "
                f"not found; {hint(name, fitting)}"
            )
    return {full: own[full] for full in own if any(matches(full, name) for name in names)}


def _may_be_adapted(module: nn.Module, own: str) -> bool:
    """Whether it is a matrix or more, and neither an nn.Linear's nor an adapter's."""
    is_linear = isinstance(module, nn.Linear) and is_called(module)
    return module._parameters[own].dim() > 1 and not (is_linear or isinstance(module, Mergeable))


class SavedParameters:
    """Those of a file, read and checked; nothing is changed before `write`."""

    def __init__(
        self, op: str, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Take the tensors of the file's `target_parameters` out of `tensors`.

        Raises:
            ValueError: not of the model's parameters, or the model has other adapters on them.
        """
        names = config.get("target_parameters") or []
        self._model = model
        present = find_parameters(model)
        self.places = parameters_named(op, "target_parameters", model, names) if names else {}
        if present and present.keys() != self.places.keys():
            raise ValueError(
                f"{op}: the model's adapted parameters must be the saved ones "
                f"{list(self.places)[:8]}, got {list(present)[:8]}"
            )
        self.present = present
        self.read: dict[str, tuple[Tensor, Tensor]] = {}
        for full, key in keys_of(self.places).items():
            holder, own = self.places[full]
            if full in present:
                present[full].require_closed(op)
                if present[full].merged:
                    raise RuntimeError(f"{op}: {full} is merged; call unmerge() first")
            else:
                check_parameter(op, full, model, holder, own)
            parts = []
            for part in ("lora_A", "lora_B"):
                file_key = f"{PREFIX}{key}.{part}.weight"
                if file_key not in tensors:
                    raise ValueError(f"{op}: the file must hold {file_key}, not found")
                parts.append(tensors.pop(file_key))
            self.read[full] = self._unpacked(op, full, *parts)

    def _unpacked(
        self, op: str, full: str, lora_A: Tensor, lora_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        holder, own = self.places[full]
        weight = holder._parameters[own]
        sizes = weight.shape if is_stack(holder, weight) else (1, *weight.shape)
        said = weight.dim() == 3 and getattr(holder, "is_transposed", False)
        k, m, n = (sizes[0], *((sizes[2], sizes[1]) if said else sizes[1:]))
        r = lora_A.shape[0] // k
        if lora_A.shape != (k * r, n) or lora_B.shape != (m, k * r) or not r:
            accepted = f"[{k} r, {n}] and [{m}, {k} r]"
            _check.refuse(op, f"lora_A and lora_B of {full}", accepted, lora_A)
        if weight.dim() == 2:
            return lora_A, lora_B
        return lora_A.reshape(k, r, n), lora_B.reshape(m, r, k).permute(2, 0, 1)

    @torch.no_grad()
    def write(self, options: Any) -> None:
        """Adapt what is not adapted yet, with `options(full, r)`, and copy the values."""
        for full, (holder, own) in self.places.items():
            lora_A, lora_B = self.read[full]
            adapter = self.present.get(full)
            if adapter is None:
                given = options(full, lora_A.shape[-2])
                kept = {name: given[name] for name in ("r", "lora_alpha", "use_rslora")}
                adapter = adapt(self._model, LoRAParameter(holder, own, **kept))
            for name, value in zip(
                ("lora_A", "lora_B"), _turned(adapter, lora_A, lora_B), strict=True
            ):
                getattr(adapter, name).copy_(value)
