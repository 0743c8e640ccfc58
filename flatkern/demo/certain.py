"""What does not depend on luck: whether weights stay exact, and what a step under noise costs."""

import copy
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

import flatkern
from flatkern._bits import count_changed
from flatkern._memory import peak_bytes
from flatkern.baselines import Published, published_perturb_, published_restore_
from flatkern.demo import experiment
from flatkern.demo.model import Encoded
from flatkern.demo.settings import SIGMA, Recipe

WINDOWS = 200
ROUNDS = 4  # each in both orders


@dataclass(frozen=True)
class Exactness:
    """Elements whose bits are not what they were, after WINDOWS windows in bfloat16."""

    elements: int
    changed: int
    published_changed: int


@dataclass(frozen=True)
class Cost:
    """One training step of an arm: the fastest of several, and the peak above the weights."""

    arm: str
    seconds: float
    peak_extra_bytes: int

    def row(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def exactness(top: nn.Module, windows: int = WINDOWS) -> Exactness:
    """Open and close in-place windows over the first layer, by flatkern and as published.

    sigma ramps up by a cosine to the papers' 0.05.
    """
    layer = copy.deepcopy(top.layer[0]).to(torch.bfloat16)
    flatkern.nn.replace_linear(layer, "all-linear", r=experiment.RANK, lora_alpha=experiment.ALPHA)
    adapted = [part for part in layer.modules() if isinstance(part, flatkern.nn.LoRALinear)]
    generator = torch.Generator().manual_seed(0)
    for part in adapted:
        part.lora_B.copy_(torch.randn(part.lora_B.shape, generator=generator) * 0.01)
    before = [part.weight.clone() for part in adapted]
    ramp = flatkern.cosine_ramp(windows)
    noise = flatkern.WeightNoise(layer, SIGMA, mode="inplace", schedule=ramp)
    for _ in range(windows):
        with noise.window():
            pass
    changed = _changed(adapted, before)
    for step in range(windows):
        sigma = SIGMA * ramp(step)
        norms = [
            published_perturb_(p.weight, p.lora_A, p.lora_B, p.scaling, sigma, step)
            for p in adapted
        ]
        for part, norm in zip(adapted, norms, strict=True):
            published_restore_(part.weight, norm, sigma, step)
    elements = sum(weight.numel() for weight in before)
    return Exactness(elements, changed, _changed(adapted, before))


def _changed(layers: Sequence[nn.Module], before: Sequence[torch.Tensor]) -> int:
    pairs = zip(layers, before, strict=True)
    return sum(count_changed(layer.weight, weight) for layer, weight in pairs)


def cost_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The arms of a comparison, and behind Flat-LoRA its other mode and the published algorithm."""
    arms = []
    for recipe in recipes:
        arms.append(recipe)
        if recipe.method == "FlatLoRA":
            inplace = recipe.options | {"mode": "inplace"}
            arms.append(replace(recipe, arm=f"{recipe.arm}, in place", options=inplace))
            arms.append(replace(recipe, arm=f"{recipe.arm}, as published", method="Published"))
    return arms


def costs(
    top: nn.Module, recipes: Sequence[Recipe], data: Encoded, rounds: int = ROUNDS
) -> list[Cost]:
    """The cost of one step of each arm, on the sentences with the most tokens.

    The arms take turns, in both orders, so that other work on the machine hits them alike.
    """
    batch = data.longest(experiment.BATCH)
    steps = []
    for recipe in recipes:
        model = experiment.build(top, data.hidden.shape[-1], recipe, seed=0).train()
        if recipe.method == "Published":
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=recipe.lr)
            method = Published(model, optimizer, recipe.sigma, seed=0)
        else:
            method = experiment.make_method(model, recipe, seed=0)
        steps.append(functools.partial(method.step, experiment.batch_loss(model), [batch]))
    for step in steps:
        step()  # the optimizer's state exists from now on
    peaks = [peak_bytes(step, data.hidden.device) for step in steps]
    fastest = [math.inf] * len(steps)
    for number in range(2 * rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for index in order:
            start = time.perf_counter()
            steps[index]()  # returns the loss as a float: a GPU has finished by then
            fastest[index] = min(fastest[index], time.perf_counter() - start)
    arms = [recipe.arm for recipe in recipes]
    return [Cost(*found) for found in zip(arms, fastest, peaks, strict=True)]
