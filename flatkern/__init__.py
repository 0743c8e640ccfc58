"""flatkern: training under weight noise, as cheap as ordinary training."""

from flatkern._version import __version__
from flatkern import noise, ops
from flatkern._backend import available_backends, backend, build_info
from flatkern.noise import NoiseKey
