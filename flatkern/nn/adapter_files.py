"""Adapter files: nothing that is read is trusted or run, nothing is written by halves.

Sizes, names and dtypes are known from a file's header, so that what does not fit the model is
refused before anything is allocated. No load path unpickles.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check

# Far beyond any configuration; a million layers would name themselves in less.
_MOST_CONFIG_BYTES = 64 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_KINDS = {
    "modules_to_save": list,
    "target_parameters": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
# A pattern of PEFT's is a regular expression. These bounds keep its matching fast: a repeated group
# that itself repeats takes exponential time, and each further repeat a power of the name's length.
_MOST_PATTERN, _MOST_REPEATS = 1000, 4
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError if that fails, for whatever reason."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.parent}: {error}") from error


def read_config(op: str, path: Path) -> dict[str, Any]:
    """The settings, of the kinds that are used here.

    Raises:
        ValueError: not JSON, not an object, too large, or a setting of another kind.
    """
    size = path.stat().st_size
    if size > _MOST_CONFIG_BYTES:
        raise ValueError(
            f"{op}: {path.name} must have at most {_MOST_CONFIG_BYTES} bytes, got {size}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {path.name} must be JSON, got {str(error)[:100]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{op}: {path.name} must be an object, got {type(config).__name__}")
    for name, kind in _KINDS.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{op}: {name} must be {kind.__name__}, got {type(value).__name__}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{op}: {name} must hold names, got {str(value)[:100]}")
    for pattern in config.get("alpha_pattern") or ():
        _check_pattern(op, pattern)
    return config


def _check_pattern(op: str, pattern: str) -> None:
    plain = re.sub(r"\\.", "", pattern)
    repeats = len(re.findall(r"[*+{]", plain))
    if len(pattern) > _MOST_PATTERN or repeats > _MOST_REPEATS or _REPEATED_GROUP.search(plain):
        raise ValueError(
            f"{op}: alpha_pattern must be regular expressions of at most {_MOST_PATTERN} letters "
            f"and {_MOST_REPEATS} repeats, none of a group, got {pattern[:100]!r}"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise ValueError(f"{op}: alpha_pattern must be regular expressions: {error}") from error


def read_header(op: str, path: Path) -> dict[str, Tensor]:
    """The file's tensors without their values, which takes no memory.

    Raises:
        ValueError: not a whole safetensors file, or a tensor of a dtype that is used nowhere.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"{op}: {name[:200]} must be floating, got {dtype}")
                shape = part.get_shape()
                # One element in all places: of the shape, and of no size.
                tensors[name] = torch.empty((), dtype=_DTYPES[dtype]).expand(shape)
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise _damaged(op, path, error) from error
    return tensors


def read_tensors(op: str, path: Path) -> dict[str, Tensor]:
    """The file's tensors, once `read_header` has been found to fit; ValueError as there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(op, path, error) from error


def _damaged(op: str, path: Path, error: Exception) -> ValueError:
    return ValueError(f"{op}: {path.name} must be a whole safetensors file, got {str(error)[:200]}")


def require_floating(op: str, name: str, tensor: Tensor) -> None:
    """ValueError unless an adapter's tensor is of a dtype that adapters have."""
    if tensor.dtype not in _check.FLOAT_DTYPES:
        _check.refuse(op, name, "float32, bfloat16, float16 or float64", tensor)


def check_shapes(name: str, module: nn.Module, parts: dict[str, Tensor]) -> None:
    """ValueError unless the saved parts have the sizes of the module."""
    r = module.r if isinstance(module, LoRALinear) else parts["lora_A"].shape[0]
    shapes = {
        "lora_A": (r, module.in_features),
        "lora_B": (module.out_features, r),
        "lora_magnitude": (module.out_features,),
    }
    for part, tensor in parts.items():
        if tensor.shape != shapes[part]:
            _check.refuse("load_adapter", f"{name}.{part}", str(list(shapes[part])), tensor)


def check_layers(
    present: dict[str, LoRALinear],
    targets: dict[str, nn.Module],
    options: dict[str, dict[str, Any]],
    kind: type[LoRALinear],
) -> None:
    """The model's layers must be the saved ones, idle, of that kind, with the saved scaling."""
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
        if type(layer) is not kind:
            raise ValueError(
                f"load_adapter: {name} must be the saved {kind.__name__}, "
                f"got {type(layer).__name__}"
            )
        if layer.offset_A is not None or options[name]["init_lora_weights"] == "pissa":
            raise ValueError(
                f"load_adapter: {name} must be over the weight that the file means, got an offset "
                "base here or there (PiSSA, LoRA-GA); load it into a plain model"
            )
    for name, module in targets.items():
        alpha, r = options[name]["lora_alpha"], options[name]["r"]
        scaling = alpha / (math.sqrt(r) if options[name]["use_rslora"] else r)
        if not math.isclose(module.scaling, scaling):
            raise ValueError(
                f"load_adapter: {name}.scaling must be the saved {scaling:g}, "
                f"got {module.scaling:g}"
            )
