"""`flatkern demo`: from nothing to a table and two pictures."""

import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from flatkern.demo import (
    DemoError,
    certain,
    choose,
    data,
    experiment,
    model,
    plots,
    report,
    settings,
)
from flatkern.demo.model import Encoded
from flatkern.demo.settings import SETTINGS, Recipe, Setting


@dataclass(frozen=True)
class Task:
    """The encoded sentences and the layers to train."""

    top: nn.Module
    splits: data.Splits
    labels: np.ndarray  # of all in-domain sentences
    tests: dict[str, Encoded]
    validation: Encoded | None
    training: dict[int, Encoded]  # by seed, with true labels

    def training_set(self, seed: int, setting: Setting) -> Encoded:
        """The training sentences of a seed with the labels that the setting gives them."""
        _, given = data.draw_training_set(
            self.labels, self.splits.pool, settings.TRAINING_SENTENCES, setting.flipped, seed
        )
        return self.training[seed].relabelled(given)


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit status is 1 if any frozen weight changed."""
    # Set before the libraries read them: nothing is looked up on a network, and the profiler
    # behind the memory column does not log its start and stop.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out: {arguments.out} cannot be made a folder: {error}") from error
    start = time.perf_counter()
    if arguments.choose:
        return _choose(arguments, start)
    return _compare(arguments, start)


class Progress:
    """Steps done: a bar on a terminal; elsewhere a line for each run, with the time left."""

    def __init__(self, steps: int) -> None:
        """`steps` is how many there will be."""
        self._bar = tqdm(total=steps, unit="step", disable=None)
        self._start = time.perf_counter()
        self._steps, self._done = steps, 0

    def begin(self, run: str) -> None:
        """What the next steps belong to."""
        self._bar.set_description(run)
        if not self._bar.disable:
            return
        left = ""
        if self._done:
            gone = time.perf_counter() - self._start
            left = f", about {gone / self._done * (self._steps - self._done) / 60:.1f} min left"
        print(f"step {self._done} of {self._steps}{left}: {run}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def prepare(
    seeds: tuple[int, ...], device: torch.device, choosing: bool, test_sentences: int
) -> Task:
    """Load model and sentences and run the lower layers over all that the task needs.

    For choosing, only the validation split is encoded; otherwise only `test_sentences` of each
    domain.
    """
    sentences = data.load_sentences()
    movies = sentences[data.IN_DOMAIN]
    splits = data.split(movies.labels, settings.TEST_SENTENCES, settings.VALIDATION_SENTENCES)
    pretrained, tokenizer = model.load_pretrained()
    lower, top = model.split_encoder(pretrained)

    def encode(part: data.Sentences, description: str) -> Encoded:
        encoded = model.encode(lower, tokenizer, part.texts, part.labels, description)
        return encoded.to(device)

    tests, validation = {}, None
    if choosing:
        validation = encode(movies.take(splits.validation), "lower layers, validation")
    else:
        rows = splits.test
        if test_sentences < len(rows):
            generator = np.random.default_rng(data.SPLIT_SEED)
            rows = rows[data.balanced(movies.labels[rows], test_sentences, generator)]
        tests[data.IN_DOMAIN] = encode(movies.take(rows), "lower layers, movies")
        for domain in data.OUT_OF_DOMAIN:
            generator = np.random.default_rng(data.SPLIT_SEED)
            other = sentences[domain]
            rows = data.balanced(other.labels, test_sentences, generator)
            tests[domain] = encode(other.take(rows), f"lower layers, {domain}")
    training = {}
    for seed in seeds:
        rows, _ = data.draw_training_set(
            movies.labels, splits.pool, settings.TRAINING_SENTENCES, 0.0, seed
        )
        training[seed] = encode(movies.take(rows), f"lower layers, seed {seed}")
    return Task(top.to(device), splits, movies.labels, tests, validation, training)


def steps(setting: Setting) -> int:
    """Optimizer steps of one run."""
    return setting.epochs * -(-settings.TRAINING_SENTENCES // experiment.BATCH)


def _compare(arguments: argparse.Namespace, start: float) -> int:
    count = arguments.seeds or (settings.FULL_SEEDS if arguments.full else settings.QUICK_SEEDS)
    used = [
        setting if arguments.full else replace(setting, epochs=setting.quick_epochs)
        for setting in SETTINGS
    ]
    recipes = {setting.name: _recipes(setting, arguments.methods) for setting in used}
    tests, draws, points = (
        (settings.TEST_SENTENCES, experiment.DRAWS, experiment.CURVE_POINTS)
        if arguments.full
        else (settings.QUICK_TEST_SENTENCES, experiment.QUICK_DRAWS, experiment.QUICK_CURVE_POINTS)
    )
    task = prepare(tuple(range(count)), arguments.device, False, tests)
    # First what is certain, because it takes seconds.
    exact = certain.exactness(task.top)
    costs = certain.costs(
        task.top, certain.cost_recipes(recipes[used[0].name]), task.training_set(0, used[0])
    )
    print(f"{report.certain_table(exact, costs)}\n", flush=True)
    runs = []
    total = count * sum(len(recipes[setting.name]) * steps(setting) for setting in used)
    progress = Progress(total)
    for setting in used:
        for seed in range(count):
            for recipe in recipes[setting.name]:
                progress.begin(f"{setting.name}, seed {seed}, {recipe.arm}")
                result = experiment.run(
                    task.top,
                    recipe,
                    task.training_set(seed, setting),
                    task.tests,
                    setting=setting.name,
                    in_domain=data.IN_DOMAIN,
                    epochs=setting.epochs,
                    seed=seed,
                    draws=draws,
                    points=points,
                    on_step=progress.step,
                )
                runs.append(result)
    progress.close()
    seconds = time.perf_counter() - start
    command = _command(arguments)
    paths = report.write_results(arguments.out, command, used, exact, costs, runs, seconds, tests)
    for name, plot in (("radius.png", plots.plot_radius), ("curves.png", plots.plot_curves)):
        plot(runs, arguments.out / name)
        paths.append(arguments.out / name)
    print(f"{report.table(runs)}\n\n{report.chosen(used)}\n\n{report.summary(runs)}\n")
    _print_paths(paths, seconds)
    changed = exact.changed + sum(run.weights_changed for run in runs)
    if changed:
        print(f"ERROR: {changed} frozen weights do not have the bits they had before training")
    return 1 if changed else 0


def _recipes(setting: Setting, methods: tuple[str, ...] | None) -> tuple[Recipe, ...]:
    return setting.recipes() if methods is None else setting.method_recipes(methods)


def _choose(arguments: argparse.Namespace, start: float) -> int:
    task = prepare(choose.SCAN_SEEDS, arguments.device, True, 0)
    chosen, tried = [], []
    progress = Progress(choose.RUNS_PER_SETTING * sum(steps(setting) for setting in SETTINGS))
    for setting in SETTINGS:
        progress.begin(setting.name)
        training = {seed: task.training_set(seed, setting) for seed in task.training}
        best, candidates = choose.choose(
            setting, task.top, training, task.validation, progress.step
        )
        chosen.append(best)
        tried.extend(candidates)
    progress.close()
    seconds = time.perf_counter() - start
    paths = report.write_choice(arguments.out, _command(arguments), chosen, tried, seconds)
    print(report.choice_table(tried))
    for setting in chosen:
        print(f"{setting.name}: lr {setting.lr}, sigma {setting.sigma}, dropout {setting.dropout}")
    _print_paths(paths, seconds)
    return 0


def _command(arguments: argparse.Namespace) -> str:
    words = ["flatkern demo"]
    words += [f"--{flag}" for flag in ("full", "choose") if getattr(arguments, flag)]
    if arguments.methods is not None:
        words.append(f"--methods {shlex.quote(','.join(arguments.methods))}")
    for option in ("seeds", "threads"):
        if (value := getattr(arguments, option)) is not None:
            words.append(f"--{option} {value}")
    if arguments.device.type != "cpu":
        words.append(f"--device {arguments.device}")
    return " ".join(words)


def _print_paths(paths: list[Path], seconds: float) -> None:
    print(f"{seconds / 60:.1f} min. Written:")
    for path in paths:
        print(f"  {path}")
