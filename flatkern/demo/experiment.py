"""One training run: a recipe, a seed, and everything that is measured about the result."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatkern
from flatkern._bits import count_changed
from flatkern.demo.data import epoch_order
from flatkern.demo.model import Batch, Encoded, TopLayers
from flatkern.demo.settings import Recipe
from flatkern.methods.base import keywords_of

RANK, ALPHA = 8, 16
BATCH = 32
EVALUATION_BATCH = 64
RADII = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
QUICK_DRAWS, DRAWS = 1, 2  # of noise at each radius
QUICK_CURVE_POINTS, CURVE_POINTS = 3, 7
CURVE_SENTENCES = 400  # of the in-domain test set, which is in random order; fewer if it has fewer
RADIUS_SEED = 12345  # not a training seed: the noise measured under was never trained under


@dataclass
class Run:
    """What came out of one training run; losses in nats, accuracies in percent."""

    setting: str
    seed: int
    recipe: Recipe
    accuracy: dict[str, float] = field(default_factory=dict)  # by domain, after the last epoch
    loss: dict[str, float] = field(default_factory=dict)
    curve_epoch: list[int] = field(default_factory=list)
    curve_accuracy: list[float] = field(default_factory=list)  # in domain
    curve_train_loss: list[float] = field(default_factory=list)  # no noise, given labels
    radius_loss: list[list[float]] = field(default_factory=list)  # [radius][draw], given labels
    weights_changed: int = 0

    def row(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def build(top: nn.Module, features: int, recipe: Recipe, seed: int) -> TopLayers:
    """A fresh model with LoRA on every linear layer of the encoder and a trainable head.

    The global generator is seeded because initialisation and dropout draw from it: every arm of a
    seed starts from the same numbers.
    """
    torch.manual_seed(seed)
    model = TopLayers(copy.deepcopy(top), features)
    flatkern.nn.replace_linear(
        model.encoder, "all-linear", r=RANK, lora_alpha=ALPHA, lora_dropout=recipe.dropout
    )
    return model.to(next(top.parameters()).device)


def make_method(model: nn.Module, recipe: Recipe, seed: int) -> flatkern.methods.Method:
    """The training method of a recipe, with AdamW over everything that is trainable."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.lr)
    options = dict(recipe.options)
    if recipe.sigma:
        options["sigma"] = recipe.sigma
    return method_named(recipe.method, model, optimizer, options, seed)


def method_named(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    options: dict[str, object],
    seed: int,
) -> flatkern.methods.Method:
    """A method of `flatkern.methods`, with the seed if it makes noise."""
    method = getattr(flatkern.methods, name)
    seeded = {"seed": seed} if "seed" in keywords_of(method) else {}
    return method(model, optimizer, **options, **seeded)


def train_epochs(
    model: nn.Module,
    method: flatkern.methods.Method,
    data: Encoded,
    epochs: int,
    seed: int,
    loss_fn: Callable[[Batch], torch.Tensor] | None = None,
) -> Iterator[tuple[int, bool]]:
    """Train; after each step yield (epoch, whether the epoch ended)."""
    loss_fn = loss_fn or batch_loss(model)
    count = len(data.labels)
    for epoch in range(1, epochs + 1):
        order = torch.from_numpy(epoch_order(count, seed, epoch)).split(BATCH)
        for number, rows in enumerate(order, start=1):
            batch = data.batch(rows)
            model.train()
            method.step(loss_fn, [batch])
            yield epoch, number == len(order)


def batch_loss(model: nn.Module) -> Callable[[Batch], torch.Tensor]:
    """The mean cross-entropy of a batch, inputs and then labels, as a method wants it."""

    def loss_fn(batch: Batch) -> torch.Tensor:
        *inputs, labels = batch
        return cross_entropy(model(*inputs), labels)

    return loss_fn


@torch.no_grad()
def evaluate(model: TopLayers, data: Encoded) -> tuple[float, float]:
    """Accuracy in percent and mean loss, in eval mode."""
    model.eval()
    correct, total = 0, 0.0
    for hidden, mask, labels in data.batches(EVALUATION_BATCH):
        logits = model(hidden, mask)
        correct += int((logits.argmax(1) == labels).sum())
        total += float(cross_entropy(logits, labels, reduction="sum"))
    return 100 * correct / len(data.labels), total / len(data.labels)


def loss_by_radius(model: TopLayers, data: Encoded, draws: int) -> list[list[float]]:
    """Mean loss [radius][draw] under Flat-LoRA's noise of each radius, the same for every arm.

    The radius is sigma: the length of a row's noise over the length of the merged weight row.
    """
    losses = [[evaluate(model, data)[1]]]
    for radius in RADII[1:]:
        noise = flatkern.WeightNoise(model, sigma=radius, seed=RADIUS_SEED)
        losses.append([])
        for _ in range(draws):
            with noise.window():
                losses[-1].append(evaluate(model, data)[1])
    return losses


class FrozenWeights:
    """A copy of every frozen tensor, to count afterwards whose bits are different."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the frozen tensors of `model` as they are now."""
        self._model = model
        self._before = {name: weight.detach().clone() for name, weight in self._frozen()}

    def _frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._model.named_parameters():
            if not weight.requires_grad:
                yield name, weight

    def changed(self) -> int:
        """How many elements of the frozen tensors do not have the bits that they had."""
        return sum(count_changed(weight, self._before[name]) for name, weight in self._frozen())


def run(
    top: nn.Module,
    recipe: Recipe,
    data: Encoded,
    tests: dict[str, Encoded],
    *,
    setting: str,
    in_domain: str,
    epochs: int,
    seed: int,
    draws: int,
    points: int,
    on_step: Callable[[], None],
) -> Run:
    """Train one arm and measure all that the demo reports.

    Args:
        top: the pretrained top layers; copied, not changed.
        recipe: the arm.
        data: the training sentences with the labels given to the arm.
        tests: the test sentences of each domain.
        setting: name of the setting, for the record.
        in_domain: which of `tests` the training curve follows.
        epochs: passes over `data`.
        seed: of initialisation, dropout, order and noise.
        draws: of noise, at each radius that the loss is measured at.
        points: of the training curves, at most.
        on_step: called after each optimizer step.
    """
    model = build(top, data.hidden.shape[-1], recipe, seed)
    frozen = FrozenWeights(model)
    method = make_method(model, recipe, seed)
    result = Run(setting, seed, recipe)
    stride = math.ceil(epochs / points)
    curve = tests[in_domain].head(CURVE_SENTENCES)
    for epoch, epoch_ended in train_epochs(model, method, data, epochs, seed):
        if epoch_ended and (epochs - epoch) % stride == 0:
            result.curve_epoch.append(epoch)
            result.curve_train_loss.append(evaluate(model, data)[1])
            result.curve_accuracy.append(evaluate(model, curve)[0])
        on_step()
    for domain, test in tests.items():
        result.accuracy[domain], result.loss[domain] = evaluate(model, test)
    result.radius_loss = loss_by_radius(model, data, draws)
    result.weights_changed = frozen.changed()
    return result
