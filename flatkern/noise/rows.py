"""Which elements of a weight are a row: those that share one scale."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# The strategies that give rows different scales.
_BY_ROW = ("row", "flat_lora", "fisher")


@dataclass(frozen=True)
class Rows:
    """The rows of a weight, which noise sees as a matrix: dim0 x rest, if nothing is said here.

    Attributes:
        stacked: the matrix is that of a stack [k, p, q] of matrices: k p x q.
        columns: 0, or how many times the matrix's columns, those of each group of its rows apart,
            are the rows: see `width`.
        width: how many neighbouring columns belong together (the elements of a kernel).
    """

    stacked: bool = False
    columns: int = 0
    width: int = 1

    def fold(self, weight: Tensor) -> Tensor:
        """The matrix as a view; of other weights than stacks the weight itself."""
        if not self.stacked or not weight.is_contiguous():
            return weight
        return weight.view(-1, weight.shape[-1])

    def count(self, shape: torch.Size) -> int:
        """How many rows there are: the length of a row scale."""
        if self.columns:
            return self.columns * (self._cols(shape) // self.width)
        return shape[:-1].numel() if self.stacked else shape[0]

    def by_row(self, weight: Tensor) -> Tensor:
        """[rows, their length], in new memory where `columns` is set; else as `fold`."""
        matrix = self.fold(weight)
        if not self.columns:
            return matrix
        groups = matrix.reshape(
            self.columns, -1, self._cols(weight.shape) // self.width, self.width
        )
        return groups.transpose(1, 2).reshape(self.count(weight.shape), -1).contiguous()

    def squares(self, gradient: Tensor) -> Tensor:
        """The sum of squares over each row, float32 or wider."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        wide = wide.contiguous() if wide.dim() else wide.view(1)
        return self.by_row(wide).reshape(self.count(wide.shape), -1).square().sum(1)

    def _cols(self, shape: torch.Size) -> int:
        return shape[-1] if self.stacked else shape[1:].numel()


def rows_of(module: nn.Module, name: str, weight: Tensor, strategy: str) -> Rows:
    """The rows of parameter `name` of a module.

    Outputs, each with the elements that it is a sum over: dim 0 of linear layers, embeddings
    (tokens) and convolutions (filters), (expert, output) of a stack of matrices, dim 1 of
    transformers' Conv1D and of transposed convolutions, and dim 2 of experts that say
    `is_transposed`. A stack is any weight of three dimensions but those of convolutions and
    nn.Bilinear.
    """
    stacked = weight.dim() == 3 and not isinstance(module, _ConvNd | nn.Bilinear)
    columns, width = 0, 1
    if strategy in _BY_ROW:
        if isinstance(module, _ConvTransposeNd) and name == "weight":
            columns, width = module.groups, weight.shape[2:].numel()
        elif weight.dim() == 2 and name == "weight" and _is_conv1d(module):
            columns = 1
        elif stacked and getattr(module, "is_transposed", False) is True:
            columns = weight.shape[0]
    return Rows(stacked, columns, width)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with a weight [in, out]."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)
