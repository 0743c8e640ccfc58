"""Put LoRA layers into a model in place of its linear layers."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from flatkern.nn.linear import LoRALinear, check_linear, check_options
from flatkern.ops import _check

_OP = "replace_linear"
_NAMES_SHOWN = 8


def replace_linear(
    model: nn.Module,
    target_modules: str | Iterable[str],
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    layer: type[LoRALinear] = LoRALinear,
    **kind: Any,
) -> list[str]:
    """Replace linear layers by `LoRALinear` layers around the same weights, and freeze the rest.

    Afterwards nothing of the model is trainable but adapters; unfreeze a head where one is
    trained. A layer that is used in several places stays one layer. Device, dtype and training
    mode stay as they are. On an error the model is as it was.

    Args:
        model: changed in place.
        target_modules: names, each matched exactly or as a dotted suffix ("q_proj" matches
            "layers.0.q_proj"), as in PEFT; or a string, which is a regular expression for the
            whole name, or "all-linear": every nn.Linear but the declared output embedding
            (`get_output_embeddings`) and nn.MultiheadAttention's out_proj.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: see `LoRALinear`.
        layer: the kind of adapter: `LoRALinear`, `DoRALinear` or `NoRALinear`.
        kind: that kind's own options.

    Returns:
        the full names of the replaced layers, in the model's order.

    Raises:
        TypeError: a target that is not an nn.Linear (or computes something of its own), a `layer`
            that is no LoRALinear, an option that it does not have.
        ValueError: a target that matches nothing, or an option out of range.
    """
    _check.kinds(_OP, nn.Module, model=model)
    if not (isinstance(layer, type) and issubclass(layer, LoRALinear)):
        raise TypeError(f"{_OP}: layer must be LoRALinear or a subclass of it, got {layer!r}")
    options = (r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
    check_options(*options)
    targets = _find(model, target_modules)

    def build(name: str, linear: nn.Linear) -> LoRALinear:
        return layer.from_linear(linear, *options, **kind)

    swap(model, targets, build)
    return list(targets)


def swap(
    model: nn.Module,
    targets: dict[str, nn.Module],
    build: Callable[[str, nn.Linear], LoRALinear],
) -> None:
    """Put `build(name, linear)` in the place of each target and freeze all but adapters.

    All checks and all allocations come before the first change.
    """
    for name, module in targets.items():
        check_linear(module, name)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    layers: dict[nn.Module, LoRALinear] = {}
    try:
        for name, linear in targets.items():
            if linear not in layers:
                layers[linear] = build(name, linear)
    except BaseException:
        for weight in trainable:
            weight.requires_grad_(True)
        raise
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[linear])
    _freeze_all_but_adapters(model)
    _leave_fast_paths(model)


def find_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers inside `model` by full name; one used in several places has several."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, LoRALinear)
    }


def _find(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """The targets by full name, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    if not isinstance(target_modules, str):
        return _find_names(modules, target_modules)
    if target_modules.lower() == "all-linear":
        heads = [
            module.get_output_embeddings()
            for module in model.modules()
            if hasattr(module, "get_output_embeddings")
        ]
        found = [
            name
            for name, module in modules.items()
            if _is_linear(module) and not any(module is head for head in heads)
        ]
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"{_OP}: target_modules must be names, a regular expression or 'all-linear', "
                f"got {target_modules!r}: {error}"
            ) from None
        found = [name for name in modules if pattern.fullmatch(name)]
    if not found:
        _refuse_unknown(modules, f"{target_modules!r}, a regular expression for the whole name")
    return {name: modules[name] for name in found}


def _find_names(modules: dict[str, nn.Module], names: Iterable[str]) -> dict[str, nn.Module]:
    _check.kinds(_OP, (list, tuple, set, frozenset), target_modules=names)
    for name in names:
        _check.kinds(_OP, str, target_modules=name)
    unknown = [name for name in names if not any(_matches(full, name) for full in modules)]
    if unknown or not names:
        _refuse_unknown(modules, ", ".join(map(repr, sorted(unknown))) or "nothing")
    return {
        full: module
        for full, module in modules.items()
        if any(_matches(full, name) for name in names)
    }


def _matches(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _refuse_unknown(modules: dict[str, nn.Module], asked: str) -> None:
    linear = [name for name, module in modules.items() if _is_linear(module)]
    shown = ", ".join(linear[:_NAMES_SHOWN]) or "none"
    more = f" and {len(linear) - _NAMES_SHOWN} more" if len(linear) > _NAMES_SHOWN else ""
    raise ValueError(
        f"{_OP}: target_modules must match modules of the model, got {asked}, not found; "
        f"its linear layers are: {shown}{more}"
    )


def _freeze_all_but_adapters(model: nn.Module) -> None:
    layers = find_lora_layers(model).values()
    adapters = {id(weight) for layer in layers for weight in layer.adapters().values()}
    for weight in model.parameters():
        if id(weight) not in adapters:
            weight.requires_grad_(False)


def _leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder call its linear layers in eval mode too.

    Its fast path reads their weights instead, and would skip adapters and noise without a word.
    """
    for module in model.modules():
        if not any(isinstance(part, LoRALinear) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
