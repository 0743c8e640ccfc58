"""Models that PEFT has adapted, seen through noise: `attach` and `detach`."""

import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from flatkern.integrations._peft_attention import AttentionSite
from flatkern.integrations._peft_layers import site_type
from flatkern.integrations._peft_reasons import why_not
from flatkern.integrations._peft_sites import Bystander, PeftSite
from flatkern.nn.names import named_modules
from flatkern.nn.sites import ATTRIBUTE
from flatkern.noise import Fisher, WeightNoise
from flatkern.noise.schedules import Schedule
from flatkern.ops import _check
from flatkern.ops._keywords import known_keywords

# Stacks that compute a whole block from base_layer.weight, lora_A and lora_B, calling no layer.
_FUSED_ATTRIBUTES = ("apply_qkv", "apply_o")
_FUSED_PACKAGES = ("unsloth", "axolotl")


@known_keywords("peft.attach")
def attach(
    model: nn.Module,
    sigma: float = 0.05,
    *,
    strategy: str = "flat_lora",
    scope: str = "merged",
    mode: str = "virtual",
    restore: str | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    ranks: str = "same",
    fisher: Fisher | None = None,
) -> WeightNoise:
    """Let windows show the base weights of PEFT's layers through noise.

        model = peft.get_peft_model(base, config)
        noise = flatkern.integrations.peft.attach(model, sigma=0.05, seed=0)
        with noise.window():
            model(**batch).loss.backward()
        optimizer.step()

    For LoRA layers (rsLoRA, PiSSA, LoRA-GA and other starts, DoRA) and AdaLoRA's, over the bases of
    docs/layers.md: linear layers, quantised ones too (docs/quantized.md; mode "inplace" refuses
    those), embeddings, convolutions, attention and parameters. The scale is that of
    W' with the adapters that are active when the window is opened; a disabled adapter's forward is
    clean. PEFT's own branch, its files and the model's state_dict keys stay what they are. In a
    window `merge` and `unmerge` raise, but under `paused()` they work, and bring the exact bits
    back; in place, adding an adapter raises too. FSDP2 and tensor parallelism may have sharded the
    weights: the noise is the same.

    Args:
        model: a PeftModel, or any module with PEFT layers.
        sigma, strategy, scope, mode, restore, schedule, seed, ranks, fisher: as in
            `flatkern.WeightNoise`.

    Returns:
        The `flatkern.WeightNoise` of the model; opened once per optimizer step.

    Warns:
        UserWarning: layers that take no noise (other bases than these, other PEFT methods), by
            name and reason; in mode "virtual", a fused implementation that
            would never see the noise.

    Raises:
        TypeError, ValueError: an argument that `WeightNoise` refuses, or no layer that can take
            noise. Nothing is left attached.
        RuntimeError: the model is attached already.
    """
    _check.kinds("peft.attach", nn.Module, model=model)
    if is_attached(model):
        raise RuntimeError("peft.attach: model is attached already; call detach(model) first")
    layers = {name: m for name, m in named_modules(model) if isinstance(m, BaseTunerLayer)}
    reasons = {name: _why_not(layer) for name, layer in layers.items()}
    # The attention around it speaks for it.
    inner = {id(m.base_layer.out_proj) for m in layers.values() if site_type(m) is AttentionSite}
    skipped = {n: why for n, why in reasons.items() if why and id(layers[n]) not in inner}
    if len(skipped) == sum(id(layer) not in inner for layer in layers.values()):
        found = f"none that can ({_listed(skipped)})" if skipped else "no PEFT layers"
        raise ValueError(
            "peft.attach: model must have PEFT layers that can take noise (peft.get_peft_model "
            f"makes them), got {found}"
        )
    try:
        for name, module in list(named_modules(model)):
            if ATTRIBUTE in module.__dict__:
                continue
            if name in layers and reasons[name] is None:
                (site_type(module) or PeftSite)(module)
            elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                Bystander(module)
        noise = WeightNoise(
            model,
            sigma,
            strategy=strategy,
            scope=scope,
            mode=mode,
            restore=restore,
            schedule=schedule,
            seed=seed,
            ranks=ranks,
            fisher=fisher,
        )
    except BaseException:
        detach(model)
        raise
    if skipped:
        warnings.warn(f"peft.attach: no noise on {_listed(skipped)}", stacklevel=3)
    fused = list(_fused(model))
    if fused and mode == "virtual":
        warnings.warn(
            f"peft.attach: {fused[0]} and {len(fused) - 1} more modules read base weights without "
            'calling the layers, so virtual noise is not seen there; use mode="inplace"',
            stacklevel=3,
        )
    return noise


def _why_not(layer: BaseTunerLayer) -> str | None:
    """Why no window can show the base weight of a layer, or None if one can."""
    kind = site_type(layer)
    return why_not(layer) if kind is None else kind.why_not(layer)


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` found layers in the model that `detach` has not left since."""
    return bool(_sites(model))


def detach(model: nn.Module) -> None:
    """Undo `attach`: no attribute and no hook is left; nothing happens if there is none.

    The `WeightNoise` that `attach` returned opens no window afterwards.

    Raises:
        RuntimeError: a window is open; nothing is undone.
    """
    _check.kinds("peft.detach", nn.Module, model=model)
    sites = _sites(model)
    for site in sites:
        site.require_clean("detach")
    for site in sites:
        site.detach()


def _sites(model: nn.Module) -> list[Bystander]:
    """Those of the model's layers, and of bases that PEFT has unloaded since."""
    found = {}
    for module in model.modules():
        forward = module.__dict__.get("forward")
        for site in (module.__dict__.get(ATTRIBUTE), getattr(forward, "__self__", None)):
            if isinstance(site, Bystander):
                found[id(site)] = site
    return list(found.values())


def _listed(skipped: dict[str, str]) -> str:
    """Reasons and their layers."""
    layers: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(f"{reason}: {_some(names)}" for reason, names in layers.items())


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _fused(model: nn.Module) -> Iterator[str]:
    """Modules above attached layers that are known to compute without calling them."""
    for name, module in named_modules(model):
        forward = module.__dict__.get("forward")
        package = getattr(forward, "__module__", None) or ""
        patched = any(hasattr(module, attribute) for attribute in _FUSED_ATTRIBUTES)
        if patched or package.split(".")[0] in _FUSED_PACKAGES:
            yield name
