"""Save and load adapters in PEFT's format."""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.linear import LoRALinear, check_linear, check_options
from flatkern.nn.replace import find_lora_layers, swap
from flatkern.ops import _check

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# Settings of PEFT under which the layer computes something else than LoRALinear.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads too.

    The adapters alone are saved, in their own dtype. The format holds one dropout for all layers:
    the largest is written.

    Args:
        model: with `LoRALinear` layers, merged or not, in a window or not.
        folder: made if it does not exist; files in it are replaced.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the model has no LoRALinear.
    """
    from safetensors.torch import save_file

    _check.kinds("save_adapter", nn.Module, model=model)
    _check.kinds("save_adapter", (str, os.PathLike), folder=folder)
    layers = find_lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: model must have LoRALinear layers, got none")
    tensors = {}
    for name, layer in layers.items():
        state = layer.state_dict()
        for part in ("lora_A", "lora_B"):
            # Copied, because safetensors refuses the shared storage of a layer used twice.
            tensors[f"base_model.model.{name}.{part}.weight"] = state[part].cpu().clone()
    config = _config(model, layers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    use_rslora = all(layer.use_rslora for layer in layers.values())
    alphas = {
        name: layer.lora_alpha if layer.use_rslora == use_rslora else layer.scaling * layer.r
        for name, layer in layers.items()
    }
    ranks = {name: layer.r for name, layer in layers.items()}
    r, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": _target_modules(model, layers),
        "r": r,
        "rank_pattern": {_whole(name): value for name, value in ranks.items() if value != r},
        "lora_alpha": alpha,
        "alpha_pattern": {_whole(name): value for name, value in alphas.items() if value != alpha},
        "lora_dropout": max(layer.lora_dropout.p for layer in layers.values()),
        "use_rslora": use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(name: str) -> str:
    """PEFT matches its patterns as suffixes unless they are anchored."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str] | str:
    """Full names; a regular expression where PEFT would match one as another layer's suffix."""
    others = [name for name, _ in model.named_modules() if name not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return list(layers)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Load an adapter that `save_adapter` or PEFT's `save_pretrained` wrote.

    A plain model gets `LoRALinear` layers as by `replace_linear` (the rest is frozen). A model
    that has some keeps them: they must be the saved ones, of the same sizes and scaling.

    Args:
        model: changed in place; on an error it is as it was.
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        the full names of the adapted layers.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: an argument or a named module of the wrong kind.
        ValueError: settings or tensors that are not plain LoRA, or do not fit the model.
        RuntimeError: a layer is merged or in a noise window.
    """
    from safetensors.torch import load_file

    _check.kinds("load_adapter", nn.Module, model=model)
    _check.kinds("load_adapter", (str, os.PathLike), folder=folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(f"load_adapter: folder must hold {file}, got {folder}")
    config = json.loads((Path(folder) / CONFIG_FILE).read_text())
    adapters = _read_adapters(load_file(Path(folder) / WEIGHTS_FILE))
    options = {name: _options(config, name, pair[0].shape[0]) for name, pair in adapters.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = sorted(adapters.keys() - modules.keys())
    if absent:
        raise ValueError(f"load_adapter: model must have the saved layers, got no {absent[:8]}")
    present = find_lora_layers(model)
    targets = {name: modules[name] for name in modules if name in adapters}
    if present:
        _check_layers(present, targets, options)
    for name, module in targets.items():
        if not present:
            check_linear(module, name)
        _check_shapes(name, module, adapters[name])
    if not present:
        swap(model, targets, lambda name, linear: LoRALinear.from_linear(linear, **options[name]))
    with torch.no_grad():
        for name in targets:
            layer = model.get_submodule(name)
            layer.lora_A.copy_(adapters[name][0])
            layer.lora_B.copy_(adapters[name][1])
    return list(targets)


def _read_adapters(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer name; ValueError for any other tensor, or half a pair."""
    names = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        if not match:
            raise ValueError(
                f"load_adapter: {WEIGHTS_FILE} must hold base_model.model.<layer>.lora_A.weight "
                f"and .lora_B.weight alone, got {key}"
            )
        names.append(match[1])
    pairs = {}
    for name in names:
        keys = [f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise ValueError(f"load_adapter: {WEIGHTS_FILE} must hold {missing[0]}, not found")
        pairs[name] = (tensors[keys[0]], tensors[keys[1]])
        for key in keys:
            if tensors[key].dim() != 2:
                _check.refuse("load_adapter", key, "2-D", tensors[key])
    if not pairs:
        raise ValueError(f"load_adapter: {WEIGHTS_FILE} must hold adapters, got none")
    return pairs


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
        # Other initialisations (PiSSA, ...) also changed the base weight, which is not saved.
        "init_lora_weights": config.get("init_lora_weights", True),
    }
    check_options(**options)
    return options


def _check_shapes(name: str, module: nn.Module, pair: tuple[Tensor, Tensor]) -> None:
    r = module.r if isinstance(module, LoRALinear) else pair[0].shape[0]
    shapes = ((r, module.in_features), (module.out_features, r))
    for part, tensor, shape in zip(("lora_A", "lora_B"), pair, shapes, strict=True):
        if tensor.shape != shape:
            _check.refuse("load_adapter", f"{name}.{part}", str(list(shape)), tensor)


def _check_layers(
    present: dict[str, LoRALinear],
    targets: dict[str, nn.Module],
    options: dict[str, dict[str, Any]],
) -> None:
    """The model's LoRALinear layers must be the saved ones, idle, with the saved scaling."""
    saved = {id(module) for module in targets.values()}
    extra = [name for name, layer in present.items() if id(layer) not in saved]
    plain = [name for name in targets if name not in present]
    if extra or plain:
        raise ValueError(
            "load_adapter: the model's LoRALinear layers must be the saved ones, "
            f"got LoRALinear {extra[:8]} that are not saved, saved {plain[:8]} that are not one"
        )
    for name, layer in present.items():
        layer.require_closed("load_adapter")
        if layer.merged:
            raise RuntimeError(f"load_adapter: {name} is merged; call unmerge() first")
    for name, module in targets.items():
        alpha, r = options[name]["lora_alpha"], options[name]["r"]
        scaling = alpha / (math.sqrt(r) if options[name]["use_rslora"] else r)
        if not math.isclose(module.scaling, scaling):
            raise ValueError(
                f"load_adapter: {name}.scaling must be the saved {scaling:g}, "
                f"got {module.scaling:g}"
            )
