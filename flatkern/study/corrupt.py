"""Damage to texts and images, by kind and severity 1 to 3; a function of its seed alone."""

import string
import unicodedata
from collections.abc import Callable

import numpy as np
from scipy import ndimage

SEVERITIES = (1, 2, 3)
# The share of places that is hit: letters, of "spacing" spaces.
_LETTERS, _SPACES = (0.05, 0.1, 0.2), (0.2, 0.5, 1.0)
# Letters of other alphabets that look alike: the tokenizer does not know that they do.
_ALIKE = str.maketrans("aceiopxyAEOPTX", "асеіорхуАЕОРТХ")  # noqa: RUF001
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {
    key: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in _ROWS for i, key in enumerate(row)
}


def texts(sentences: list[str], kind: str, severity: int, seed: int) -> list[str]:
    """Damaged copies of `sentences`; `kind` is one of TEXT_KINDS."""
    generator = np.random.default_rng([seed, 3])
    return [TEXT_KINDS[kind](text, severity - 1, generator) for text in sentences]


def _each_letter(change: Callable[[str, np.random.Generator], str]) -> Callable[..., str]:
    def damage(text: str, level: int, generator: np.random.Generator) -> str:
        hit = generator.random(len(text)) < _LETTERS[level]
        pairs = zip(text, hit, strict=True)
        return "".join(change(c, generator) if h and c.isalpha() else c for c, h in pairs)

    return damage


def _typo(letter: str, generator: np.random.Generator) -> str:
    near = _NEIGHBOURS.get(letter.lower()) or string.ascii_lowercase
    wrong = near[generator.integers(len(near))]
    return ("", letter + letter, wrong, letter + wrong)[generator.integers(4)]


def _look_alike(letter: str, generator: np.random.Generator) -> str:
    other = letter.translate(_ALIKE)
    return (
        other
        if other != letter
        else unicodedata.normalize("NFC", f"{letter}\N{COMBINING ACUTE ACCENT}")
    )


def _spacing(text: str, level: int, generator: np.random.Generator) -> str:
    """Spaces vanish, and half as many appear inside words."""
    share = _SPACES[level]
    draws = generator.random(len(text))
    out = []
    for letter, draw in zip(text, draws, strict=True):
        if letter == " " and draw < share:
            continue
        out.append(letter)
        if letter.isalpha() and draw < share / 20:
            out.append(" ")
    return "".join(out)


TEXT_KINDS: dict[str, Callable[[str, int, np.random.Generator], str]] = {
    "typos": _each_letter(_typo),
    "spacing": _spacing,
    "case": _each_letter(lambda letter, _: letter.swapcase()),
    "unicode": _each_letter(_look_alike),
}


def images(pixels: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    """Damaged copies of float32 `pixels` [n, height, width] in 0 to 1; `kind` of IMAGE_KINDS."""
    generator = np.random.default_rng([seed, 4])
    changed = IMAGE_KINDS[kind](pixels, severity - 1, generator)
    return changed.clip(0, 1).astype(np.float32)


def _noise(pixels: np.ndarray, level: int, generator: np.random.Generator) -> np.ndarray:
    return pixels + (0.2, 0.35, 0.5)[level] * generator.standard_normal(pixels.shape)


def _blur(pixels: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    size = (1.0, 1.5, 2.0)[level]
    return ndimage.gaussian_filter(pixels, (0, size, size))


def _turn(pixels: np.ndarray, level: int, generator: np.random.Generator) -> np.ndarray:
    angles = (15, 30, 45)[level] * generator.choice([-1, 1], len(pixels))
    pairs = zip(pixels, angles, strict=True)
    return np.stack([ndimage.rotate(one, angle, reshape=False, order=1) for one, angle in pairs])


def _contrast(pixels: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    return 0.5 + (0.5, 0.3, 0.15)[level] * (pixels - 0.5)


IMAGE_KINDS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "rotation": _turn,
    "contrast": _contrast,
}
