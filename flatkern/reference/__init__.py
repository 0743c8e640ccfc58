"""Plain PyTorch: the meaning of every op, readable, on any device, also in float64.

Functions here trust their arguments: `flatkern.ops` has checked them, and hands over weights as
2-D matrices. Full-size temporaries are allowed here and nowhere else.
"""

from flatkern.reference.noise import noise, philox_bits, uniform
from flatkern.reference.perturb import perturb, perturb_, perturb_out, restore_
from flatkern.reference.perturb_merged import perturb_merged_
from flatkern.reference.perturb_plane import perturb_plane
from flatkern.reference.row_norm import row_norm

__all__ = [
    "noise",
    "perturb",
    "perturb_",
    "perturb_merged_",
    "perturb_out",
    "perturb_plane",
    "philox_bits",
    "restore_",
    "row_norm",
    "uniform",
]
