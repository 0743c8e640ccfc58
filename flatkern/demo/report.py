"""The demo's words and numbers: the table, the summary and the JSON record."""

import dataclasses
import json
import platform
import statistics
from pathlib import Path

import torch
from tabulate import tabulate

import flatkern
from flatkern.demo import certain, choose, data, experiment, model, settings
from flatkern.demo.certain import Cost, Exactness
from flatkern.demo.experiment import Run

HEADERS = (
    "labels",
    "arm",
    "accuracy %\nmovies",
    "accuracy %\nout of domain",
    "loss\nmovies",
    "loss\nout of domain",
    "train loss +\nat radius 0.4",
    "frozen weights\nchanged",
)
STEEPNESS_RADIUS = 0.4
LIMITS = (
    "One small model, one task, {sets} of {count} sentences: this says nothing of a gain elsewhere."
)


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def outside(by_domain: dict[str, float]) -> float:
    """Mean over the domains that were not trained on."""
    return statistics.mean(by_domain[domain] for domain in data.OUT_OF_DOMAIN)


def grouped(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by (setting, arm), in the order in which they were made."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.setting, run.recipe.arm), []).append(run)
    return groups


def table(runs: list[Run], tablefmt: str = "simple") -> str:
    """One row per setting and arm: mean ± sd over the seeds."""
    rows = []
    for (setting, arm), group in grouped(runs).items():
        rows.append(
            (
                setting,
                arm,
                spread([run.accuracy[data.IN_DOMAIN] for run in group], 1),
                spread([outside(run.accuracy) for run in group], 1),
                spread([run.loss[data.IN_DOMAIN] for run in group], 2),
                spread([outside(run.loss) for run in group], 2),
                spread([_rise(run) for run in group], 3),
                sum(run.weights_changed for run in group),
            )
        )
    headers = HEADERS if tablefmt == "simple" else [text.replace("\n", " ") for text in HEADERS]
    return tabulate(rows, headers, tablefmt, disable_numparse=True)


def _rise(run: Run) -> float:
    """How much the train loss rises under noise of STEEPNESS_RADIUS: how steep the minimum is."""
    radius = experiment.RADII.index(STEEPNESS_RADIUS)
    return statistics.mean(run.radius_loss[radius]) - run.radius_loss[0][0]


def certain_table(exact: Exactness, costs: list[Cost], tablefmt: str = "simple") -> str:
    """Whether weights stay exact, and the cost of a step of each arm over plain LoRA's."""
    published = exact.published_changed / exact.elements
    words = (
        f"Frozen weights changed by {certain.WINDOWS} in-place windows over an encoder layer in "
        f"bfloat16\n(sigma = {settings.SIGMA} after a cosine ramp): flatkern {exact.changed} of "
        f"{exact.elements:,}, the published\nadd-then-subtract {published:.1%}."
    )
    plain = costs[0]
    rows = [
        (
            cost.arm,
            f"{cost.seconds / plain.seconds:.2f}",
            f"{cost.peak_extra_bytes / plain.peak_extra_bytes:.2f}"
            if plain.peak_extra_bytes
            else "",
        )
        for cost in costs
    ]
    headers = ("a training step of", "time x LoRA", "memory x LoRA")
    return f"{words}\n\n{tabulate(rows, headers, tablefmt, disable_numparse=True)}"


def summary(runs: list[Run]) -> str:
    """What came out, arm against plain LoRA, seed by seed; and what it does not show."""
    groups = grouped(runs)
    lines = []
    for setting in dict.fromkeys(run.setting for run in runs):
        arms = {arm: group for (name, arm), group in groups.items() if name == setting}
        plain = arms.pop("LoRA")
        parts = [_difference(arm, group, plain) for arm, group in arms.items()]
        arms = {"LoRA": plain} | arms
        best = max(arms, key=lambda arm: _mean_accuracy(arms[arm]))
        parts.append(f"highest mean accuracy on movies: {best}")
        parts.append(f"at the best epoch of the test curve: {_best_epochs(arms)}")
        lines.append("\n".join([f"{setting}:", *(f"  {part}" for part in parts)]))
    seeds = len({run.seed for run in runs})
    sets = f"{seeds} training set" + ("s" if seeds > 1 else "")
    lines.append(LIMITS.format(sets=sets, count=settings.TRAINING_SENTENCES))
    return "\n".join(lines)


def chosen(used: list[settings.Setting]) -> str:
    """The values that the arms took, and the papers' beside them."""
    lines = [
        f"{setting.name}: lr {setting.lr}, Flat-LoRA's sigma {setting.sigma}, dropout "
        f"{setting.dropout}, {setting.epochs} epochs"
        for setting in used
    ]
    lines.append(
        "sigma and dropout chosen on a validation split; the papers' sigma is 0.05 to 0.15"
    )
    return "\n".join(lines)


def _mean_accuracy(group: list[Run]) -> float:
    return statistics.mean(run.accuracy[data.IN_DOMAIN] for run in group)


def _best_epochs(arms: dict[str, list[Run]]) -> str:
    """What stopping at the right epoch would give each arm: chosen on the test, so a bound."""
    words = []
    for arm, group in arms.items():
        curve = zip(*(run.curve_accuracy for run in group), strict=True)
        accuracy, epoch = max(
            (statistics.mean(samples), epoch)
            for samples, epoch in zip(curve, group[0].curve_epoch, strict=True)
        )
        words.append(f"{arm} {accuracy:.1f} (epoch {epoch})")
    return ", ".join(words)


def _difference(arm: str, group: list[Run], plain: list[Run]) -> str:
    """Paired over the seeds: both arms of a seed had the same sentences, labels and start."""
    pairs = list(zip(group, plain, strict=True))
    inside = [run.accuracy[data.IN_DOMAIN] - base.accuracy[data.IN_DOMAIN] for run, base in pairs]
    away = [outside(run.accuracy) - outside(base.accuracy) for run, base in pairs]
    loss = [run.loss[data.IN_DOMAIN] - base.loss[data.IN_DOMAIN] for run, base in pairs]
    better = sum(difference > 0 for difference in inside)
    return (
        f"{arm} against LoRA {statistics.mean(inside):+.1f} points on movies (better in {better} "
        f"of {len(pairs)} seeds), {statistics.mean(away):+.1f} out of domain, "
        f"loss {statistics.mean(loss):+.2f}"
    )


def versions() -> dict[str, object]:
    """What ran: versions, machine, and the pinned inputs."""
    import transformers

    return {
        "flatkern": flatkern.build_info(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "texts": {"file": data.ARCHIVE, "sha256": data.SHA256},
    }


def config() -> dict[str, object]:
    """Every number that is the same for all arms and seeds."""
    return {
        "training_sentences": settings.TRAINING_SENTENCES,
        "validation_sentences": settings.VALIDATION_SENTENCES,
        "max_tokens": model.MAX_TOKENS,
        "trained_layers": model.TRAINED_LAYERS,
        "lora": {"r": experiment.RANK, "lora_alpha": experiment.ALPHA, "target": "all-linear"},
        "batch": experiment.BATCH,
        "optimizer": "AdamW",
        "radii": experiment.RADII,
        "split_seed": data.SPLIT_SEED,
    }


def write_results(
    folder: Path,
    command: str,
    used: list[settings.Setting],
    exact: Exactness,
    costs: list[Cost],
    runs: list[Run],
    seconds: float,
    test_sentences: int,
) -> list[Path]:
    """Write results.md and results.json; return their paths. `test_sentences` of each domain."""
    minutes = f"{seconds / 60:.1f} min on {torch.get_num_threads()} threads"
    markdown = folder / "results.md"
    markdown.write_text(
        f"# Flat-LoRA beside LoRA\n\n`{command}` ({minutes}, {versions()['machine']}, "
        f"torch {torch.__version__})\n\n"
        f"{certain_table(exact, costs, 'github')}\n\n{table(runs, 'github')}\n\n{chosen(used)}\n\n"
        f"{summary(runs)}\n",
        encoding="utf-8",
    )
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "config": config() | {"test_sentences_per_domain": test_sentences},
        "settings": [dataclasses.asdict(setting) for setting in used],
        "exactness": dataclasses.asdict(exact) | {"windows": certain.WINDOWS},
        "costs": [cost.row() for cost in costs],
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    return [markdown, _write_json(folder / "results.json", record)]


def choice_table(tried: list[choose.Candidate]) -> str:
    """One row per value tried on the validation split."""
    rows = [
        (
            candidate.setting,
            candidate.recipe.arm,
            candidate.recipe.lr,
            candidate.recipe.sigma or "",
            candidate.recipe.dropout or "",
            spread(candidate.accuracies, 2),
        )
        for candidate in tried
    ]
    headers = ("labels", "arm", "lr", "sigma", "dropout", "accuracy %, validation")
    return tabulate(rows, headers, "github", disable_numparse=True)


def write_choice(
    folder: Path,
    command: str,
    chosen: list[settings.Setting],
    tried: list[choose.Candidate],
    seconds: float,
) -> list[Path]:
    """Write choice.md and choice.json; return their paths."""
    lines = [
        f"{setting.name}: lr {setting.lr}, sigma {setting.sigma}, dropout {setting.dropout}"
        for setting in chosen
    ]
    markdown = folder / "choice.md"
    markdown.write_text(
        "# How sigma and dropout were chosen\n\n"
        f"`{command}` ({seconds / 60:.1f} min on {torch.get_num_threads()} threads)\n\n"
        + "Mean ± sd over the seeds; the validation split has true labels in both settings.\n\n"
        + f"{choice_table(tried)}\n\nChosen:\n\n"
        + "".join(f"- {line}\n" for line in lines),
        encoding="utf-8",
    )
    record = {
        "command": command,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "config": config() | {"scan_seeds": choose.SCAN_SEEDS},
        "chosen": [dataclasses.asdict(setting) for setting in chosen],
        "tried": [dataclasses.asdict(candidate) for candidate in tried],
    }
    return [markdown, _write_json(folder / "choice.json", record)]


def _write_json(path: Path, record: dict[str, object]) -> Path:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
