"""Scopes: which weights of a model take noise, and what their scale is taken from."""

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flatkern.nn.sites import Site, site_of
from flatkern.noise import shards
from flatkern.noise.numbers import ADAPTERS, tensor_numbers
from flatkern.noise.targets import Target
from flatkern.ops import _check

SCOPES = ("merged", "origin", "lora", "full", "all", "trainable")


def collect(model: nn.Module, scope: str, strategy: str) -> list[Target]:
    """The weights in scope, each tensor once, in the model's order.

    - merged: the base weights of sites (LoRALinear and attached layers), with the scale of
      W' = W + s B A;
    - origin: every tensor but the adapters; lora: the adapters; full: both; trainable: every
      trainable parameter; each with the scale of its own values;
    - all: as merged, and with "element" every tensor of fewer than two dimensions and every
      embedding, adapters excepted.

    Tensors that are not floating point are left out, and so are quantised ones but those of sites.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    layers: dict[int, list[Site]] = {}
    embeddings = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(weight), []).append((module, name))
        site = site_of(module)
        if site is not None and site.weight is not None:
            layers.setdefault(id(site.weight), []).append(site)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(id(module.weight))
    numbers = tensor_numbers(model)
    targets = []
    for name, weight in model.named_parameters():
        base, is_adapter = layers.get(id(weight), []), numbers[name] >= ADAPTERS
        if not base and not _has_elements(weight):
            continue
        small = not is_adapter and (weight.dim() < 2 or id(weight) in embeddings)
        merged = bool(base) and scope in ("merged", "all")
        chosen = (
            merged
            or {
                "merged": False,
                "origin": not is_adapter,
                "lora": is_adapter,
                "full": True,
                "all": small,
                "trainable": weight.requires_grad,
            }[scope]
        )
        if chosen:
            own = "element" if scope == "all" and not merged else strategy
            targets.append(Target(name, numbers[name], base, owners[id(weight)], own, merged))
    return targets


def _has_elements(weight: Tensor) -> bool:
    """Whether it holds floating-point elements, and not what some library makes them from."""
    wrapped = is_traceable_wrapper_subclass(weight) and not shards.is_sharded(weight)
    return weight.dtype in _check.FLOAT_DTYPES and not wrapped
