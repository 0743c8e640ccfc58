"""Noise keys, schedules, scale strategies and the window that a model sees them through."""

from flatkern.noise.fisher import Fisher
from flatkern.noise.keys import NoiseKey
from flatkern.noise.registry import close
from flatkern.noise.schedules import (
    constant,
    cosine_ramp,
    inverse_sqrt,
    linear_decay,
    linear_ramp,
    lpf,
)
from flatkern.noise.window import WeightNoise

__all__ = [
    "Fisher",
    "NoiseKey",
    "WeightNoise",
    "close",
    "constant",
    "cosine_ramp",
    "inverse_sqrt",
    "linear_decay",
    "linear_ramp",
    "lpf",
]
