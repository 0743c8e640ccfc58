"""flatkern: training under weight noise, with every weight restored to the bit."""

from flatkern import landscape, methods, nn, noise, ops
from flatkern._backend import available_backends, backend, build_info
from flatkern._version import __version__
from flatkern.noise import (
    Fisher,
    NoiseKey,
    WeightNoise,
    close,
    constant,
    cosine_ramp,
    inverse_sqrt,
    linear_decay,
    linear_ramp,
    lpf,
)

__all__ = [
    "Fisher",
    "NoiseKey",
    "WeightNoise",
    "__version__",
    "available_backends",
    "backend",
    "build_info",
    "close",
    "constant",
    "cosine_ramp",
    "inverse_sqrt",
    "landscape",
    "linear_decay",
    "linear_ramp",
    "lpf",
    "methods",
    "nn",
    "noise",
    "ops",
]
