"""The public ops; each is also registered as `torch.ops.flatkern.<name>`."""

from flatkern.ops.foreach import foreach_perturb_, foreach_restore_, foreach_row_norm
from flatkern.ops.noise import noise, philox_bits, uniform
from flatkern.ops.noisy_linear import noisy_linear
from flatkern.ops.perturb import perturb, perturb_, restore_
from flatkern.ops.perturb_merged import perturb_merged_
from flatkern.ops.perturb_plane import perturb_plane
from flatkern.ops.residual import check_residual, new_residual
from flatkern.ops.row_norm import row_norm

__all__ = [
    "check_residual",
    "foreach_perturb_",
    "foreach_restore_",
    "foreach_row_norm",
    "new_residual",
    "noise",
    "noisy_linear",
    "perturb",
    "perturb_",
    "perturb_merged_",
    "perturb_plane",
    "philox_bits",
    "restore_",
    "row_norm",
    "uniform",
]
