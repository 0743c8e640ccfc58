"""`flatkern landscape`: how flat local Hugging Face models and their PEFT adapters are."""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flatkern import landscape

# Strengths of the radius curve, in multiples of --sigma.
_CURVE = (0.25, 0.5, 1.0, 1.5, 2.0)
_BASE = "base"


class CommandError(Exception):
    """What the user gave does not do; the message says what would."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; see `flatkern landscape --help`."""

    model: str
    adapter: list[str]
    data: Path
    task: str
    out: Path
    points: int
    radius: float
    sigma: float
    draws: int
    seed: int
    scope: str | None
    hessian: bool
    batch_size: int
    max_length: int
    rows: int
    device: torch.device
    quiet: bool


@dataclass
class Figures:
    """One model's figures; rises are over `loss`, NaN where a loss was."""

    name: str
    loss: float
    average: float
    low: float
    high: float
    sampled_worst: float
    ascent_worst: float | None
    top_eigenvalue: float | None = None

    def cells(self) -> dict[str, object]:
        """The row of the table."""
        row = {
            "model": self.name,
            "loss": f"{self.loss:.4f}",
            "average rise": f"{self.average:.3g} [{self.low:.3g}, {self.high:.3g}]",
            "worst of the draws": f"{self.sampled_worst:.3g}",
            "worst by ascent": "" if self.ascent_worst is None else f"{self.ascent_worst:.3g}",
        }
        if self.top_eigenvalue is not None:
            row["top eigenvalue"] = f"{self.top_eigenvalue:.4g}"
        return row


def run(asked: Asked) -> tuple[list[Figures], list[Path]]:
    """Measure every adapter along the same directions, and the model itself if none is named.

    Returns:
        the figures, and the files that were written: landscape.json, pictures, and of each model
        surface-NAME.json, from which an interrupted run goes on.

    Raises:
        CommandError: see the message; nothing was measured.
    """
    texts, labels = read(asked.data, asked.task == "classification", asked.rows)
    folders = _named(asked.adapter)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "landscape.json").touch()
    except OSError as error:
        raise CommandError(f"--out must be a folder that can be written: {error}") from error
    figures, surfaces, curves = [], {}, {}
    for name, folder in folders.items():
        model, loss_fn = load(asked, folder, texts, labels)
        options = {"seed": asked.seed, "scope": asked.scope, "progress": not asked.quiet}
        save = asked.out / f"surface-{name}.json"
        sampled = options | {"draws": asked.draws}
        sigmas = [asked.sigma * factor for factor in _CURVE]
        if not asked.quiet:
            print(f"{name}:", file=sys.stderr)
        curve = curves[name] = landscape.radius_curve(model, loss_fn, sigmas=sigmas, **sampled)
        worst = landscape.worst_flatness(model, loss_fn, sigma=asked.sigma, **sampled)
        top = landscape.hessian_top_eigenvalue(model, loss_fn, **options) if asked.hessian else None
        grid = {"points": asked.points, "radius": asked.radius, "save": save}
        surfaces[name] = landscape.surface_2d(model, loss_fn, **grid, **options)
        own = _CURVE.index(1.0)
        average = (float(part[own]) for part in (curve.mean, curve.low, curve.high))
        rises = *average, worst.sampled, worst.ascent, top
        figures.append(Figures(name, worst.plain, *rises))
    paths = [asked.out / "landscape.json"]
    record = {key: str(value) for key, value in dataclasses.asdict(asked).items()}
    rows = [dataclasses.asdict(one) for one in figures]
    paths[0].write_text(json.dumps({"asked": record, "models": rows}, indent=1) + "\n")
    paths += [asked.out / f"surface-{name}.json" for name in folders]
    if any(surface.loss.isfinite().any() for surface in surfaces.values()):
        paths += [
            landscape.plot_surface(surfaces, asked.out / "surface.png"),
            landscape.plot_surface(surfaces, asked.out / "surface.html"),
        ]
    paths.append(landscape.plot_radius(curves, asked.out / "radius.png"))
    return figures, paths


def _named(adapters: list[str]) -> dict[str, str | None]:
    """The folders by the names that pictures have for them."""
    if not adapters:
        return {_BASE: None}
    names = [Path(folder).name for folder in adapters]
    if len(set(names)) < len(names):
        names = [folder.strip("/").replace("/", "-") for folder in adapters]
    return dict(zip(names, adapters, strict=True))


def read(path: Path, labelled: bool, rows: int) -> tuple[list[str], list[int]]:
    """Texts, and labels if asked for: of .txt (a text a line), .csv or .jsonl (text, label).

    Raises:
        CommandError: not such a file, or nothing in it.
    """
    try:
        found = list(_rows(path))[:rows]
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise CommandError(f"--data must be a .txt, .csv or .jsonl file: {error}") from error
    try:
        texts = [row["text"] for row in found if row["text"].strip()]
        labels = [int(row["label"]) for row in found if row["text"].strip()] if labelled else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        needed = "text and label (a whole number)" if labelled else "text"
        columns = ", ".join(found[0]) if isinstance(found[0], dict) else repr(found[0])
        raise CommandError(f"--data must have the columns {needed}, got {columns}") from error
    if not texts:
        raise CommandError(f"--data must hold at least one text, got none in {path}")
    return texts, labels


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
        elif path.suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        elif path.suffix == ".txt":
            yield from ({"text": line.rstrip("\n")} for line in file)
        else:
            raise ValueError(f"got {path.name}")


def load(
    asked: Asked, adapter: str | None, texts: list[str], labels: list[int]
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model, with the adapter attached, and its mean loss over the texts."""
    import transformers

    kinds = {
        "causal": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model, local_files_only=True)
        # No pickles, and no code but transformers' own.
        model = kinds[asked.task].from_pretrained(
            asked.model, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CommandError(
            "MODEL must be the folder of a Hugging Face model, or a name in the local cache, for "
            f"--task {asked.task}; got {asked.model}: {str(error).splitlines()[0]}"
        ) from error
    if adapter is not None:
        from peft import PeftModel

        from flatkern.integrations.peft import attach

        # PEFT would unpickle adapter_model.bin, or look for the name on the Hub.
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(adapter) / file).is_file():
                raise CommandError(
                    f"--adapter must be the folder of a PEFT adapter, with {file}, got {adapter}"
                )
        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"--adapter must be a PEFT adapter of MODEL: {error}") from error
        attach(model)
    model.to(asked.device).eval()
    # The Hessian needs gradients; the figures move whatever is in scope, trained or not.
    model.requires_grad_(True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for begin in range(0, len(texts), asked.batch_size):
        part = slice(begin, begin + asked.batch_size)
        batch = tokenizer(
            texts[part],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=asked.max_length,
        )
        if asked.task == "causal":
            target = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            weight = int((target[:, 1:] != -100).sum())
        else:
            target = torch.tensor(labels[part])
            weight = len(target)
        if weight:
            batches.append((batch.to(asked.device), target.to(asked.device), weight))
    if not batches:
        raise CommandError("--data must hold texts of at least two tokens, got none")
    classes = model.config.num_labels
    if labels and not all(0 <= label < classes for label in labels):
        raise CommandError(f"--data must have labels in [0, {classes}), got {sorted(set(labels))}")

    def loss_fn() -> Tensor:
        total = sum(
            model(**batch, labels=target).loss * weight for batch, target, weight in batches
        )
        return total / sum(weight for *_, weight in batches)

    return model, loss_fn
