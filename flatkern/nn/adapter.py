"""Save and load adapters in PEFT's format."""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatkern._files import write_files
from flatkern.nn.adapter_files import (
    check_layers,
    check_shapes,
    read_config,
    read_header,
    read_tensors,
    require_floating,
    save_tensors,
)
from flatkern.nn.dora import DoRALinear
from flatkern.nn.linear import LoRALinear, check_linear, check_options
from flatkern.nn.names import named_modules
from flatkern.nn.parameter_files import SavedParameters, find_parameters, tensors_of
from flatkern.nn.parameters import LoRAParameter
from flatkern.nn.replace import find_lora_layers, leave_fast_paths, swap
from flatkern.nn.saved import (
    PREFIX,
    find_saved,
    mark,
    read_saved,
    state_of,
    unwrapped,
    written,
)
from flatkern.nn.shards import is_sharded, whole
from flatkern.ops import _check

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Names in the file of what a layer calls lora_A, lora_B and lora_magnitude.
_PARTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)")
# Settings of PEFT under which the layer computes something else than our layers.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    modules_to_save: Iterable[str] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads too.

    The adapters are saved, in their own dtype, as adapters of the original weight; and whole, as
    PEFT's `modules_to_save`, what is trained beside them, a head for example. Names are those of
    the unwrapped model: `torch.compile`, DDP, FSDP2 and checkpointing wrappers do not show. A
    `DoRALinear` is PEFT's DoRA. What the format has no word for becomes plain LoRA: a `NoRALinear`
    of rank r' (its products A' A and B B'), a `BDALinear` (D A and B), and a layer with an offset
    base (PiSSA, LoRA-GA) of rank 2 r, s (B A - B0 A0), which is off by the rounding of the base. So
    that training can go on, keep the model's `state_dict` too. The format holds one dropout for all
    layers: the largest is written. Sharded layers (FSDP, tensor parallelism) are gathered: every
    rank must call, and the first writes.

    Args:
        model: with `LoRALinear` layers, merged or not, in a window or not.
        folder: made if it does not exist; files in it are replaced when the new ones are whole.
        modules_to_save: names of modules without adapters to save whole, matched as targets of
            `replace_linear`; None: the heads and other modules that it left trainable or
            `load_adapter` read, and every module with trainable parameters of its own.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the model has no LoRALinear, or DoRALinear layers beside others; wrong names.
        OSError: the folder cannot be written, or is full: its files are what they were.

    Warns:
        UserWarning: trainable parameters that are not saved, by name; adapters on
            nn.MultiheadAttention's out_proj.weight, which PEFT would not use.
    """
    _check.kinds("save_adapter", nn.Module, model=model)
    _check.kinds("save_adapter", (str, os.PathLike), folder=folder)
    layers = find_lora_layers(model)
    parameters = find_parameters(model)
    if not (layers or parameters):
        raise ValueError("save_adapter: model must have LoRALinear layers, got none")
    saved, lost = find_saved("save_adapter", model, modules_to_save)
    parts = {name: _parts(layer) for name, layer in layers.items()}
    ranks = {name: len(parts[name]["lora_A"]) for name in layers}
    ranks |= {name: adapter.r for name, adapter in parameters.items()}
    config = _config(model, layers, parameters, ranks)
    config["modules_to_save"] = list(saved) or None
    tensors = {f"{name}.{_PARTS[key]}": v for name in layers for key, v in parts[name].items()}
    tensors |= tensors_of("save_adapter", parameters)
    for name, module in saved.items():
        tensors |= {f"{name}.{key}": whole(v) for key, v in state_of(module).items()}
    # Copied, because safetensors refuses the shared storage of a layer used twice.
    tensors = {f"{PREFIX}{key}": v.detach().cpu().clone() for key, v in tensors.items()}
    if lost:
        warnings.warn(
            f"save_adapter: trainable but not saved: {', '.join(lost[:8])}"
            + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            + "; a module without adapters is saved whole if modules_to_save names it",
            stacklevel=2,
        )
    if any(map(is_sharded, model.parameters())) and torch.distributed.get_rank() > 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(
        folder,
        {
            WEIGHTS_FILE: lambda path: save_tensors(tensors, path),
            CONFIG_FILE: lambda path: path.write_text(text),
        },
    )


@torch.no_grad()
def _parts(layer: LoRALinear) -> dict[str, Tensor]:
    """The layer's adapter relative to the original weight: W' = W + s B A, or DoRA's of that V."""
    # Not the attributes: the state is clean in any window.
    saved = (*layer.adapters(), "offset_A", "offset_B")
    state = {name: whole(value) for name, value in layer.state_dict().items() if name in saved}
    parts = {part: state[part] for part in _PARTS if part in state}
    if layer.products is not None:
        own = {name: state[name] for name in layer.adapters()}
        dtype = own["lora_A"].dtype
        parts["lora_A"], parts["lora_B"] = (part.to(dtype) for part in layer.products(**own))
    if "offset_A" in state:
        parts["lora_A"] = torch.cat([parts["lora_A"], state["offset_A"]])
        parts["lora_B"] = torch.cat([parts["lora_B"], -state["offset_B"]], dim=1)
    return parts


def _config(
    model: nn.Module,
    layers: dict[str, LoRALinear],
    parameters: dict[str, LoRAParameter],
    ranks: dict[str, int],
) -> dict[str, Any]:
    adapted: dict[str, Any] = layers | parameters
    use_rslora = all(layer.use_rslora for layer in adapted.values())
    use_dora = any(isinstance(layer, DoRALinear) for layer in layers.values())
    others = [name for name, layer in layers.items() if not isinstance(layer, DoRALinear)]
    if use_dora and others:
        raise ValueError(
            f"save_adapter: model must have DoRALinear layers only or none, got {others[:8]} beside"
        )
    alphas = {
        name: layer.lora_alpha
        if (layer.use_rslora, layer.r) == (use_rslora, ranks[name])
        else layer.scaling * (math.sqrt(ranks[name]) if use_rslora else ranks[name])
        for name, layer in adapted.items()
    }
    r, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": _target_modules(model, layers),
        "target_parameters": list(parameters) or None,
        "r": r,
        "rank_pattern": {_whole(name): value for name, value in ranks.items() if value != r},
        "lora_alpha": alpha,
        "alpha_pattern": {_whole(name): value for name, value in alphas.items() if value != alpha},
        "lora_dropout": max((layer.lora_dropout.p for layer in layers.values()), default=0.0),
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(name: str) -> str:
    """PEFT matches its patterns as suffixes unless they are anchored."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str] | str:
    """Full names; a regular expression where PEFT would match one as another layer's suffix."""
    others = [name for name, _ in named_modules(model) if name not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return list(layers)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Load an adapter that `save_adapter` or PEFT's `save_pretrained` wrote.

    A plain model gets `LoRALinear` or `DoRALinear` layers as by `replace_linear`, and the rest is
    frozen but for the file's `modules_to_save`, which are read as well; an adapter that PEFT
    trained from "pissa" gets its base from the SVD again, as in PEFT. A model that has layers
    keeps them: they must be the saved ones, of the same kind, sizes and scaling, over the original
    weights.

    Args:
        model: changed in place; on an error it is as it was.
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        the full names of the adapted layers.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: an argument or a named module of the wrong kind.
        ValueError: settings or tensors that are neither LoRA nor DoRA, or do not fit the model.
        RuntimeError: a layer is merged or in a noise window.
    """
    _check.kinds("load_adapter", nn.Module, model=model)
    _check.kinds("load_adapter", (str, os.PathLike), folder=folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(f"load_adapter: folder must hold {file}, got {folder}")
    config = read_config("load_adapter", Path(folder) / CONFIG_FILE)
    file = Path(folder) / WEIGHTS_FILE
    # By the header alone first: what does not fit is refused before it is read.
    _checked(model, config, read_header("load_adapter", file))
    kind, modules, saved, parameters, adapters, options, present, targets = _checked(
        model, config, read_tensors("load_adapter", file)
    )
    with written(modules, saved):
        if not present:
            kept = [modules[name] for name in saved]
            swap(model, targets, lambda name, old: kind.from_linear(old, **options[name]), kept)
    mark(modules[name] for name in saved)
    layers = find_lora_layers(model)
    with torch.no_grad():
        for name in targets:
            for part, value in adapters[name].items():
                getattr(layers[name], part).copy_(value)
    parameters.write(lambda name, r: _options(config, name, r))
    leave_fast_paths(model)
    return [*targets, *parameters.places]


class _Checked(NamedTuple):
    """What a file holds for a model that it fits; nothing is changed yet."""

    kind: type[LoRALinear]
    modules: dict[str, nn.Module]
    saved: dict[str, dict[str, Tensor]]
    parameters: SavedParameters
    adapters: dict[str, dict[str, Tensor]]
    options: dict[str, dict[str, Any]]
    present: dict[str, LoRALinear]
    targets: dict[str, nn.Module]


def _checked(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Checked:
    """Check everything against the model; the tensors may be without values."""
    kind = DoRALinear if config.get("use_dora") else LoRALinear
    modules = dict(named_modules(model, remove_duplicate=False))
    tensors = unwrapped("load_adapter", tensors, modules)
    for name, tensor in tensors.items():
        if _KEY.fullmatch(name):
            require_floating("load_adapter", name, tensor)
    saved = _read_saved(model, config, tensors)
    parameters = SavedParameters("load_adapter", model, config, tensors)
    adapters = _read_adapters(tensors, kind) if tensors or not parameters.read else {}
    options = {
        name: _options(config, name, parts["lora_A"].shape[0]) for name, parts in adapters.items()
    }
    absent = sorted(adapters.keys() - modules.keys())
    if absent:
        raise ValueError(f"load_adapter: model must have the saved layers, got no {absent[:8]}")
    present = find_lora_layers(model)
    targets = {name: modules[name] for name in modules if name in adapters}
    if present:
        check_layers(present, targets, options, kind)
    for name, module in targets.items():
        if not present:
            check_linear(module, name)
        check_shapes(name, module, adapters[name])
    return _Checked(kind, modules, saved, parameters, adapters, options, present, targets)


def _read_saved(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Take the tensors of the file's `modules_to_save` out of `tensors`."""
    names = config.get("modules_to_save")
    if not names:
        return {}
    keys = [key for key in tensors if key.startswith(PREFIX) and not _KEY.fullmatch(key)]
    own = {key.removeprefix(PREFIX): tensors.pop(key) for key in keys}
    return read_saved("load_adapter", model, names, own)


def _read_adapters(
    tensors: dict[str, Tensor], kind: type[LoRALinear]
) -> dict[str, dict[str, Tensor]]:
    """The parts of each layer; ValueError for any other tensor, or where one is missing."""
    parts = dict(_PARTS)
    if kind is not DoRALinear:
        del parts["lora_magnitude"]
    names = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        if not match or match[2] not in parts.values():
            raise ValueError(
                f"load_adapter: {WEIGHTS_FILE} must hold base_model.model.<layer>."
                f"<{' or '.join(parts.values())}> alone, got {key[:200]}"
            )
        names.append(match[1])
    adapters: dict[str, dict[str, Tensor]] = {}
    for name in names:
        adapters[name] = {}
        for part, word in parts.items():
            key = f"{PREFIX}{name}.{word}"
            if key not in tensors:
                raise ValueError(f"load_adapter: {WEIGHTS_FILE} must hold {key}, not found")
            dim = 1 if part == "lora_magnitude" else 2
            if tensors[key].dim() != dim:
                _check.refuse("load_adapter", key, f"{dim}-D", tensors[key])
            adapters[name][part] = tensors[key]
    if not adapters:
        raise ValueError(f"load_adapter: {WEIGHTS_FILE} must hold adapters, got none")
    return adapters


def _options(config: dict[str, Any], name: str, r: int) -> dict[str, Any]:
    """The `LoRALinear` options of one saved layer; ValueError if PEFT means something else."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"load_adapter: peft_type must be LORA, got {config.get('peft_type')!r}")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise ValueError(f"load_adapter: {field} must be unset, got {config[field]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"load_adapter: bias must be 'none', got {config['bias']!r}")
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    options = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora", False),
        # Others (LoRA-GA, PiSSA by random SVD, ...) changed the base weight beyond recomputing.
        "init_lora_weights": config.get("init_lora_weights", True),
    }
    check_options(**options)
    return options
