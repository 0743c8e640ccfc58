"""Choose sigma and dropout on the validation split; the test set is not read."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from flatkern.demo.experiment import build, evaluate, make_method, train_epochs
from flatkern.demo.model import Encoded
from flatkern.demo.settings import Recipe, Setting

# As many candidates for dropout as for sigma, and seeds that are not reported. The learning rate
# is not chosen but plain LoRA is run at others too, to see what it would do there.
LRS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
SIGMAS = (0.1, 0.2, 0.4, 0.6, 0.8)
DROPOUTS = (0.1, 0.3, 0.5, 0.7, 0.9)
SCAN_SEEDS = (1000, 1001)
RUNS_PER_SETTING = len(SCAN_SEEDS) * (len(LRS) + len(SIGMAS) + len(DROPOUTS))


@dataclass(frozen=True)
class Candidate:
    """One value tried: accuracy in percent on the validation split, one per scan seed."""

    setting: str
    recipe: Recipe
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Mean accuracy over the scan seeds."""
        return statistics.mean(self.accuracies)


def choose(
    setting: Setting,
    top: nn.Module,
    training: dict[int, Encoded],
    validation: Encoded,
    on_step: Callable[[], None],
) -> tuple[Setting, list[Candidate]]:
    """The setting with its best values filled in, and all that was tried.

    Args:
        setting: which experiment; its sigma and dropout are ignored.
        top: the pretrained top layers.
        training: the training set of each scan seed, with the setting's labels.
        validation: the validation split with true labels, also where training labels are flipped.
        on_step: called after each optimizer step.
    """

    def attempt(recipe: Recipe) -> Candidate:
        accuracies = []
        for seed, data in training.items():
            model = build(top, data.hidden.shape[-1], recipe, seed)
            method = make_method(model, recipe, seed)
            for _ in train_epochs(model, method, data, setting.epochs, seed):
                on_step()
            accuracies.append(evaluate(model, validation)[0])
        return Candidate(setting.name, recipe, accuracies)

    def best(candidates: list[Candidate]) -> Recipe:
        tried.extend(candidates)
        return max(candidates, key=lambda candidate: candidate.mean).recipe

    tried = [attempt(Recipe("LoRA", lr)) for lr in LRS]
    lr = setting.lr
    noisy = [Recipe("Flat-LoRA", lr, sigma=sigma, method="FlatLoRA") for sigma in SIGMAS]
    sigma = best([attempt(recipe) for recipe in noisy]).sigma
    dropout = best(
        [attempt(Recipe("LoRA + dropout", lr, dropout=dropout)) for dropout in DROPOUTS]
    ).dropout
    return replace(setting, sigma=sigma, dropout=dropout), tried
