"""What initialisations from data share: which layers, and how the model is run."""

import contextlib
from collections.abc import Iterator

from torch import nn

from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check


def idle_layers(
    op: str, model: nn.Module, kind: type[LoRALinear] = LoRALinear
) -> dict[str, LoRALinear]:
    """The layers of this kind in the model, itself included, by name and each once.

    Raises:
        TypeError: not a module.
        ValueError: there is none.
        RuntimeError: one is merged or in a window of `WeightNoise`.
    """
    _check.kinds(op, nn.Module, model=model)
    layers = {
        name or "the layer": layer
        for name, layer in model.named_modules()
        if isinstance(layer, kind)
    }
    if not layers:
        raise ValueError(f"{op}: model must have {kind.__name__} layers, got none")
    for name, layer in layers.items():
        layer.require_closed(op)
        if layer.merged:
            raise RuntimeError(f"{op}: {name} is merged; call unmerge() first")
    return layers


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, and running statistics stay; every module's own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
