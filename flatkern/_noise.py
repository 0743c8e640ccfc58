"""The noise of a weight, as the code below the ops' schemas hands it on."""

from typing import Any, NamedTuple

from torch import Tensor


class Noise(NamedTuple):
    """Everything that e_ij = c_i z_ij (|W_ij|) of a weight depends on.

    Attributes:
        row_scale: c, float32 [m].
        key: int64 [4], (seed, step, draw, tensor).
        elementwise: whether e is multiplied by |W_ij|.
        row_offset, col_offset: global coordinates of the weight's first element.
    """

    row_scale: Tensor
    key: Tensor
    elementwise: bool = False
    row_offset: int = 0
    col_offset: int = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What every op takes by position, behind the weight."""
        return self[:2]

    @property
    def options(self) -> dict[str, Any]:
        """What every op takes by name."""
        return {
            "elementwise": self.elementwise,
            "row_offset": self.row_offset,
            "col_offset": self.col_offset,
        }

    def part(self, row: int, rows: int, col: int = 0) -> "Noise":
        """Of a block of so many rows, from (row, col) of this weight on."""
        return self._replace(
            row_scale=self.row_scale[row : row + rows],
            row_offset=self.row_offset + row,
            col_offset=self.col_offset + col,
        )
