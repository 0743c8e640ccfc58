"""The weights of a model that take noise: what each of them is, in and out of windows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatkern.nn import shards
from flatkern.nn.sites import Quantized, Site
from flatkern.noise.fisher import Fisher
from flatkern.noise.rows import Rows


@dataclass(frozen=True, eq=False)
class Target:
    """One weight under noise; what windows do to it is its `State`.

    Attributes:
        name: of the weight in the unwrapped model.
        number: the tensor number in its noise keys.
        layers: the sites whose base weight it is, if any.
        owners: every (module, parameter name) that holds the weight.
        strategy: the name of what gives its scale.
        merged: whether that is the scale of W' = W + s B A, with the first layer's adapters.
        rows: which elements share a scale.
        restore: how the clean bits are kept, see `WeightNoise`.
        fisher: what divides the scale, see `Fisher`.
    """

    name: str
    number: int
    layers: list[Site]
    owners: list[tuple[nn.Module, str]]
    strategy: str
    merged: bool
    rows: Rows
    restore: str | None
    fisher: Fisher | None

    @property
    def weight(self) -> Tensor:
        """The weight, outside autograd; looked up each time, because it may be replaced.

        Where it is sharded this is the DTensor, and `part` what this rank holds.
        """
        module, name = self.owners[0]
        weight = getattr(module, name).detach()
        # The ops take nothing without dimensions.
        return weight if weight.dim() else weight.view(1)

    @property
    def quantized(self) -> Quantized | None:
        """How the weight is stored, if not as its elements."""
        return self.layers[0].quantized if self.layers else None

    @property
    def shape(self) -> torch.Size:
        """Of the weight's elements."""
        return self.weight.shape if self.quantized is None else self.quantized.shape

    @property
    def dtype(self) -> torch.dtype:
        """Which implementation serves the weight goes by it."""
        return self.weight.dtype if self.quantized is None else torch.float32

    @property
    def part(self) -> shards.Part:
        """What this rank holds of the weight, as the matrix that noise sees."""
        part = shards.part_of(self.weight)
        if not self.rows.stacked:
            return part
        return shards.Part(self.rows.fold(part.local), part.row * self.weight.shape[1], 0)

    @property
    def elementwise(self) -> bool:
        """Whether the noise is multiplied by |W_ij|."""
        return self.strategy == "element"

    def is_virtual(self, mode: str) -> bool:
        """Whether the layers add the noise: only sites can, to their base weight."""
        return mode == "virtual" and bool(self.layers)

    def make_by_row(self) -> Tensor:
        """What the scale is taken of, [rows, their length]: new memory if it is quantised."""
        stored = self.quantized
        elements = self.weight if stored is None else stored.dequantize(torch.float32).detach()
        return self.rows.by_row(elements)
