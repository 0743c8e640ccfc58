"""A `state_dict` of numbers and tensors on disk, without pickle."""

import json
from typing import Any

from torch import Tensor

_METADATA = "flatkern state"
_TENSOR = "$tensor"


def save_state(state: dict[str, Any], path: str) -> None:
    """Write a safetensors file: tensors as they are, everything else as JSON in its metadata."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    save_file(tensors, path, metadata={_METADATA: json.dumps(plain(state))})


def load_state(path: str) -> dict[str, Any]:
    """What `save_state` wrote; tuples come back as lists.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:

            def whole(value: Any) -> Any:
                if isinstance(value, dict):
                    if value.keys() == {_TENSOR}:
                        return file.get_tensor(value[_TENSOR])
                    return {key: whole(item) for key, item in value.items()}
                return [whole(item) for item in value] if isinstance(value, list) else value

            return whole(json.loads(file.metadata()[_METADATA]))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a method's state, got {str(error)[:200]}") from error
