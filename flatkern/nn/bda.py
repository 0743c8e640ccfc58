"""B D A: a small factor between the two of LoRA, trained with them."""

from torch import nn

from flatkern.nn.factors import bda_factors
from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check


class BDALinear(LoRALinear):
    """y = x W^T + b + s B D A dropout(x), where A, B and D between them are trained.

    D starts as the identity, so a new layer is a `LoRALinear` of the same start, "pissa" included.
    A vector is a gate for each rank (Ding et al., "Sparse low-rank adaptation of pre-trained
    language models", 2023; its proximal step is the optimizer's part), a matrix mixes them (Wu et
    al., "Mixture-of-subspaces in low-rank adaptation", 2024).

    Attributes:
        lora_D: D, [r], or [r, r] if `square`, of lora_A's dtype.
        square: whether D is a matrix.
    """

    products = staticmethod(bda_factors)

    @classmethod
    def check_kind(cls, r: int, square: bool = False) -> None:
        """TypeError unless `square` is a bool."""
        _check.kinds(cls.__name__, bool, square=square)

    def _build_kind(self, square: bool = False) -> None:
        self.square = square
        sizes = (self.r, self.r) if square else (self.r,)
        self.lora_D = nn.Parameter(self.lora_A.new_empty(sizes))

    def _init_adapters(self, init_lora_weights: bool | str) -> None:
        super()._init_adapters(init_lora_weights)
        (nn.init.eye_ if self.square else nn.init.ones_)(self.lora_D)

    def extra_repr(self) -> str:
        """Sizes and options, for print(model)."""
        return super().extra_repr() + (", square=True" if self.square else "")
