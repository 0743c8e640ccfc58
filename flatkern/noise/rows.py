"""Which elements of a weight are a row: those that share one scale."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from flatkern import ops
from flatkern.nn.layouts import is_stack, is_transposed, transposed_blocks

# The strategies that give rows different scales.
_BY_ROW = ("row", "flat_lora", "fisher")
# Elements of noise that are made at a time where kernels cannot add it: 4 MiB.
_PANEL = 2**20
Noises = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """The rows of a weight, which noise sees as a matrix: dim0 x rest, if nothing is said here.

    Attributes:
        stacked: the matrix is that of a stack [k, p, q] of matrices: k p x q.
        columns: 0, or how many times the matrix's columns, those of each group of its rows apart,
            are the rows: see `width`.
        width: how many neighbouring columns belong together (the elements of a kernel).
        padding: the row that takes no noise, an embedding's for padding; None if there is none.
    """

    stacked: bool = False
    columns: int = 0
    width: int = 1
    padding: int | None = None

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

    def perturb_columns_(
        self,
        matrix: Tensor,
        noises: Noises,
        *,
        elementwise: bool = False,
        first: int = 0,
        total: int | None = None,
    ) -> None:
        """Add noise where rows are columns: element by element as the kernels do.

        In panels of bounded size, outside autograd.

        Args:
            matrix: rows `first` and following of all `total` of the matrix that noise sees.
            noises: (c of the whole weight, key) of each noise; their sum is added.
            elementwise: as in `flatkern.ops.perturb_`.
        """
        total = matrix.shape[0] if total is None else total
        groups, own = self._by_group(noises), total // self.columns
        step = max(_PANEL // max(matrix.shape[1], 1), 1)
        begin, last = first, first + matrix.shape[0]
        while begin < last:
            group = begin // own
            end = min(begin + step, (group + 1) * own, last)
            panel = matrix.detach()[begin - first : end - first]
            panel.copy_(_noisy_panel(panel, groups[group], begin, elementwise))
            begin = end

    def perturbed_columns(
        self, matrix: Tensor, noises: Noises, elementwise: bool = False
    ) -> Tensor:
        """The same of a whole matrix as a new tensor, for compilers and torch.func."""
        groups = zip(matrix.chunk(self.columns), self._by_group(noises), strict=True)
        own = matrix.shape[0] // self.columns
        return torch.cat(
            [
                _noisy_panel(panel, noises, i * own, elementwise)
                for i, (panel, noises) in enumerate(groups)
            ]
        )

    def _by_group(self, noises: Noises) -> list[Noises]:
        """For each group of rows: (a scale for each of the matrix's columns, key) of each noise."""
        scaled = [(self._column_scales(row_scale), key) for row_scale, key in noises]
        return [[(scales[i], key) for scales, key in scaled] for i in range(self.columns)]

    def _column_scales(self, row_scale: Tensor) -> Tensor:
        """[columns, the matrix's columns]."""
        scales = torch.where(row_scale.isfinite(), row_scale, 0.0).view(self.columns, -1)
        return scales.repeat_interleave(self.width, dim=1)

    def squares(self, gradient: Tensor) -> Tensor:
        """The sum of squares over each row, float32 or wider."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        wide = wide.contiguous() if wide.dim() else wide.view(1)
        return self.by_row(wide).reshape(self.count(wide.shape), -1).square().sum(1)

    def _cols(self, shape: torch.Size) -> int:
        return shape[-1] if self.stacked else shape[1:].numel()


def _noisy_panel(panel: Tensor, noises: Noises, begin: int, elementwise: bool) -> Tensor:
    """What `perturb` (of two noises `perturb_plane`) gives, with a scale for each column."""
    rows, cols = panel.shape
    terms = [ops.noise(rows, cols, key, row_offset=begin) * scale for scale, key in noises]
    e = functools.reduce(torch.add, terms)
    if elementwise:
        e = e * panel.abs()
    noisy = (panel + e).to(panel.dtype)
    return torch.where(noisy.isfinite() & panel.isfinite(), noisy, panel)


def rows_of(
    module: nn.Module, name: str, weight: Tensor, strategy: str, merged: bool = False
) -> Rows:
    """The rows of parameter `name` of a module.

    Outputs, each with the elements that it is a sum over: dim 0 of linear layers, embeddings
    (tokens) and convolutions (filters), (expert, output) of a stack of matrices, dim 1 of
    transformers' Conv1D and of transposed convolutions, and dim 2 of stacks [k, in, out], see
    `flatkern.nn.layouts`. A stack is any weight of three dimensions but those of convolutions and
    nn.Bilinear.

    Args:
        module, name, weight: the parameter.
        strategy: only some care which elements share a scale.
        merged: whether the scale is that of W' = W + s B A, whose B has a row for each output.
    """
    stacked = is_stack(module, weight)
    columns, width, padding = 0, 1, None
    if merged or strategy in _BY_ROW:
        if isinstance(module, _ConvTransposeNd) and name == "weight":
            columns, width = module.groups, weight.shape[2:].numel()
        elif weight.dim() == 2:
            columns = transposed_blocks(module, name)
        elif stacked and is_transposed(module, name):
            columns = weight.shape[0]
    if isinstance(module, nn.Embedding) and name == "weight":
        padding = module.padding_idx
    return Rows(stacked, columns, width, padding)
