"""Put LoRA layers into a model in place of its linear layers."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from flatkern.nn.linear import LoRALinear, check_linear, check_options
from flatkern.nn.names import named_modules
from flatkern.nn.parameter_files import parameters_named
from flatkern.nn.parameters import LoRAParameter, adapt, adapter_on, check_parameter
from flatkern.nn.saved import keep, matches, matching, output_layers
from flatkern.ops import _check
from flatkern.ops._keywords import refuse_unknown

_OP = "replace_linear"
_NAMES_SHOWN = 8
# From which share of a model's elements on stacked weights are worth a warning.
_LARGE_SHARE = 0.05


def replace_linear(
    model: nn.Module,
    target_modules: str | Iterable[str],
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    layer: type[LoRALinear] = LoRALinear,
    modules_to_save: Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
    **kind: Any,
) -> list[str]:
    """Replace linear layers by `LoRALinear` layers around the same weights, and freeze the rest.

    Afterwards nothing of the model is trainable but adapters, the modules of `modules_to_save`,
    and with "all-linear" a task's head, which is new: `save_adapter` saves these too. A layer that
    is used in several places stays one layer. Device, dtype and training mode stay as they are. On
    an error the model is as it was.

    Args:
        model: changed in place.
        target_modules: names, each matched exactly or as a dotted suffix ("q_proj" matches
            "layers.0.q_proj"), as in PEFT; or a string, which is a regular expression for the
            whole name, or "all-linear": every nn.Linear but nn.MultiheadAttention's out_proj and,
            as in PEFT, the output layers: the declared output embedding (`get_output_embeddings`),
            which stays frozen, or else the head of a model for a task (what a
            `...ForSequenceClassification` adds to its base model; `classifier`, `score` or
            `qa_outputs` of others; timm's `get_classifier()`), which is trained.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: see `LoRALinear`.
        layer: the kind of adapter: `LoRALinear`, `DoRALinear`, `NoRALinear` or `BDALinear`.
        modules_to_save: names of modules, matched as targets are, that are trained whole; what
            they hold is no target.
        target_parameters: names of parameters, matched as targets are, that get a `LoRAParameter`:
            those of modules that are no nn.Linear, such as stacked experts
            ("experts.gate_up_proj", "experts.down_proj"), GPT-2's Conv1D ("c_attn.weight"),
            embeddings, convolutions, and nn.MultiheadAttention's "in_proj_weight" and
            "out_proj.weight". `target_modules` may then be []. Without dropout, as in
            PEFT.
        kind: that kind's own options: NoRALinear's r_inner, DoRALinear's renorm,
            BDALinear's square.

    Returns:
        the full names of the replaced layers, then of the adapted parameters, in the model's order,
        without those of wrappers such as `torch.compile`'s.

    Raises:
        TypeError: a target that is not an nn.Linear (or computes something of its own), a model
            with PEFT's layers, a `layer` that is no LoRALinear, an option that it does not have.
        ValueError: a target that matches nothing, or an option out of range.

    Warns:
        UserWarning: stacked weights (of experts, say) that hold much of the model and take no
            adapters; a model that is in DistributedDataParallel already.
    """
    _check.kinds(_OP, nn.Module, model=model)
    if not (isinstance(layer, type) and issubclass(layer, LoRALinear)):
        raise TypeError(f"{_OP}: layer must be LoRALinear or a subclass of it, got {layer!r}")
    _check_kind(layer, kind)
    _refuse_peft(model)
    options = (r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
    check_options(*options)
    modules = dict(named_modules(model, remove_duplicate=False))
    modules.pop("", None)
    kept = [] if modules_to_save is None else _named(modules, modules_to_save)
    parameters = {} if target_parameters is None else _find_parameters(model, target_parameters)
    only_parameters = parameters and not isinstance(target_modules, str) and not target_modules
    targets = {} if only_parameters else _find(model, modules, target_modules, kept)
    for full, (_, own) in parameters.items():
        if lora_dropout:
            accepted = f"0 with target_parameters, whose product no one divides: {full}"
            _check.refuse(_OP, "lora_dropout", accepted, lora_dropout)
        if full.removesuffix(f".{own}") in targets:
            raise ValueError(
                f"{_OP}: target_parameters must be of other modules than target_modules, got {full}"
            )
    own_options = (r, lora_alpha, use_rslora)
    adapters = [LoRAParameter(*place, *own_options) for place in parameters.values()]

    def build(name: str, linear: nn.Linear) -> LoRALinear:
        return layer.from_linear(linear, *options, **kind)

    swap(model, targets, build, kept)
    for adapter in adapters:
        adapt(model, adapter)
    leave_fast_paths(model)
    _warn_of_what_is_left(model)
    return [*targets, *parameters]


def _find_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    found = parameters_named(_OP, "target_parameters", model, names)
    for full, place in found.items():
        if adapter_on(*place) is not None:
            raise ValueError(f"{_OP}: target_parameters must have no adapters yet, got {full}")
        check_parameter(_OP, full, model, *place)
    return found


def _check_kind(layer: type[LoRALinear], kind: dict[str, Any]) -> None:
    """TypeError for an option that neither `replace_linear` nor this kind of layer has."""
    accepted = inspect.signature(layer.check_kind).parameters
    if any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        return
    own = [name for name in accepted if name != "r"]
    refuse_unknown(_OP, [*inspect.signature(replace_linear).parameters][:-1] + own, kind)
    if unsuited := kind.keys() - set(own):
        raise TypeError(f"{_OP}: {layer.__name__} has no option {min(unsuited)}")


def _named(modules: dict[str, nn.Module], names: Iterable[str]) -> list[nn.Module]:
    return [modules[name] for name in matching(_OP, "modules_to_save", modules, names)]


def _refuse_peft(model: nn.Module) -> None:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    found = [name for name, part in named_modules(model) if isinstance(part, tuners.BaseTunerLayer)]
    if found:
        raise TypeError(
            f"{_OP}: model must be without PEFT's layers, got {', '.join(found[:_NAMES_SHOWN])}; "
            "flatkern.integrations.peft.attach(model) gives a PEFT model its noise"
        )


def _warn_of_what_is_left(model: nn.Module) -> None:
    stacked, total = {}, 0
    for name, module in named_modules(model):
        for own, weight in module._parameters.items():
            if weight is None:
                continue
            total += weight.numel()
            if adapter_on(module, own) is not None or isinstance(module, LoRAParameter):
                continue
            if weight.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd):
                stacked[f"{name}.{own}"] = weight.numel()
    share = sum(stacked.values()) / max(total, 1)
    if share >= _LARGE_SHARE:
        names = ", ".join(list(stacked)[:_NAMES_SHOWN])
        more = f" and {len(stacked) - _NAMES_SHOWN} more" if len(stacked) > _NAMES_SHOWN else ""
        warnings.warn(
            f"{_OP}: no adapters on stacked weights, which hold {share:.0%} of the model's "
            f"elements and are no nn.Linear: {names}{more}",
            stacklevel=3,
        )
    if any(isinstance(part, DistributedDataParallel) for part in model.modules()):
        warnings.warn(
            f"{_OP}: DistributedDataParallel does not know the new adapters, so their gradients "
            "are not averaged over ranks; wrap the model after replace_linear",
            stacklevel=3,
        )


def swap(
    model: nn.Module,
    targets: dict[str, nn.Module],
    build: Callable[[str, nn.Linear], LoRALinear],
    kept: Iterable[nn.Module] = (),
) -> None:
    """Put `build(name, linear)` in the place of each target and freeze all but adapters.

    All checks and all allocations come before the first change.

    Args:
        model: changed in place.
        targets: by full name in the unwrapped model.
        build: makes a layer.
        kept: modules that are trained and saved whole.
    """
    for name, module in targets.items():
        check_linear(module, name)
    places = _places(model, targets)
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
    for name, (parent, child) in places.items():
        setattr(parent, child, layers[targets[name]])
    _freeze_all_but_adapters(model)
    keep(kept)
    leave_fast_paths(model)


def _places(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """The module that holds each target, a wrapper perhaps, and under which name.

    Raises:
        ValueError: a target that torch.compile has compiled by itself: it would go on calling it.
    """
    plain = iter(named_modules(model, remove_duplicate=False))
    name, module = next(plain, ("", None))
    places = {}
    # In the same order but for the wrappers, which the one leaves out.
    for raw, each in model.named_modules(remove_duplicate=False):
        if each is not module:
            continue
        if name in targets:
            above, _, child = raw.rpartition(".")
            parent = model.get_submodule(above)
            if child == "_orig_mod":
                raise ValueError(f"{_OP}: {name} is compiled by itself; replace it first")
            places[name] = parent, child
        name, module = next(plain, ("", None))
    return places


def find_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers inside `model` by full name in the unwrapped model.

    One that is used in several places has several.
    """
    return {
        name: module
        for name, module in named_modules(model, remove_duplicate=False)
        if name and isinstance(module, LoRALinear)
    }


def _find(
    model: nn.Module,
    modules: dict[str, nn.Module],
    target_modules: str | Iterable[str],
    kept: list[nn.Module],
) -> dict[str, nn.Module]:
    """The targets by full name, in the model's order; heads join `kept`."""
    if not isinstance(target_modules, str):
        found = list(_find_names(modules, target_modules))
        asked = "nothing outside modules_to_save"
    elif target_modules.lower() == "all-linear":
        embeddings, heads = output_layers(model)
        kept += heads
        found = [
            name
            for name, module in modules.items()
            if _is_linear(module) and not any(module is each for each in embeddings)
        ]
        asked = f"{target_modules!r} outside the output layers"
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"{_OP}: target_modules must be names, a regular expression or 'all-linear', "
                f"got {target_modules!r}: {error}"
            ) from None
        found = [name for name in modules if pattern.fullmatch(name)]
        asked = f"{target_modules!r}, a regular expression for the whole name"
    inside = {part for module in kept for part in module.modules()}
    found = [name for name in found if modules[name] not in inside]
    if not found:
        _refuse_unknown(modules, asked)
    return {name: modules[name] for name in found}


def _find_names(modules: dict[str, nn.Module], names: Iterable[str]) -> dict[str, nn.Module]:
    _check.kinds(_OP, (list, tuple, set, frozenset), target_modules=names)
    for name in names:
        _check.kinds(_OP, str, target_modules=name)
    unknown = [name for name in names if not any(matches(full, name) for full in modules)]
    if unknown or not names:
        _refuse_unknown(modules, ", ".join(map(repr, sorted(unknown))) or "nothing")
    return {
        full: module
        for full, module in modules.items()
        if any(matches(full, name) for name in names)
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _refuse_unknown(modules: dict[str, nn.Module], asked: str) -> None:
    linear = [name for name, module in modules.items() if _is_linear(module)]
    shown = ", ".join(linear[:_NAMES_SHOWN]) or "none"
    more = f" and {len(linear) - _NAMES_SHOWN} more" if len(linear) > _NAMES_SHOWN else ""
    raise ValueError(
        f"{_OP}: target_modules must match modules of the model, got {asked}, not found; "
        f"its linear layers are: {shown}{more}; weights of other modules go in target_parameters"
    )


def _freeze_all_but_adapters(model: nn.Module) -> None:
    layers = find_lora_layers(model).values()
    own = [module for module in model.modules() if isinstance(module, LoRAParameter)]
    adapters = {id(weight) for part in (*layers, *own) for weight in part.adapters().values()}
    for weight in model.parameters():
        if id(weight) not in adapters:
            weight.requires_grad_(False)


def leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder call its linear layers in eval mode too.

    Its fast path reads their weights instead, and would skip adapters and noise without a word.
    """
    for module in model.modules():
        if not any(isinstance(part, LoRALinear | LoRAParameter) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
