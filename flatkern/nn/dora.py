"""DoRA: a low-rank adapter for the directions of a weight's rows, a vector for their lengths."""

from typing import Any

import torch
from torch import Tensor, nn

from flatkern import _backend, ops
from flatkern.nn import shards
from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check

# Scratch for the panels in which a noisy weight is made to take its norms.
_SCRATCH_BYTES = 32 * 2**20


class DoRALinear(LoRALinear):
    """y = x W'^T + b with W'_i = mu_i V_i / ||V_i||, V = W + s B A; A, B and mu are trained.

    ||V|| is a constant to autograd, and outside a window the layer is PEFT's on the same values,
    up to rounding; in training with dropout, as there, y = x W^T + b + (d W'^T - d W^T) for the
    dropped input d. Source: Liu et al., "DoRA", 2024, equation 5 and section 4.3.

    In a window of `WeightNoise` the noise is V's, of row scale sigma / sqrt(n) ||V_i|| with
    `flat_lora`. The denominator stays the clean ||V_i||, so W' gets exactly
    sigma / sqrt(n) |mu_i| z_ij.

    Attributes:
        lora_magnitude: mu, [out_features], of lora_A's dtype; starts as ||V||.
        renorm: whether a window divides by the norm of the noisy V, as PEFT's layer does over a
            perturbed weight: then each noisy row keeps the length |mu_i|, and the noise shrinks
            with the row, by about 1 / sqrt(1 + sigma^2).
    """

    @classmethod
    def check_kind(cls, r: int, renorm: bool = False) -> None:
        """TypeError unless `renorm` is a bool."""
        _check.kinds(cls.__name__, bool, renorm=renorm)

    def _build_kind(self, renorm: bool = False) -> None:
        self.renorm = renorm
        # ||V|| of the open window, float32 [m] at a fixed address.
        self._window_norm: Tensor | None = None
        self.lora_magnitude = nn.Parameter(torch.empty_like(self.lora_B[:, 0]))

    def _init_adapters(self, init_lora_weights: bool | str) -> None:
        super()._init_adapters(init_lora_weights)
        with torch.no_grad():
            self.lora_magnitude.copy_(self._norm(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype that nn.Linear would return."""
        if self.merged:
            return super().forward(x)
        rest = self.bias
        if self.training and self.lora_dropout.p > 0:
            dropped = self.lora_dropout(self._wide(x)).to(x.dtype)
            rest = self._base(x - dropped, self.bias)
            x = dropped
        rows = self._adapted(x, None)
        result = rows * self.row_factor()
        return (result if rest is None else result + rest).to(rows.dtype)

    def row_factor(self) -> Tensor:
        """d = mu / ||V||, [m], with the ||V|| of an open window."""
        window = self._window
        shown = window is not None and (window.noisy or window.perturbed)
        return self.lora_magnitude / (self._window_norm if shown else self._norm(self.weight))

    @property
    def takes_shards(self) -> bool:
        """Whether `weight` may be sharded: not where all of it is made to take its norm."""
        return not self.renorm

    def _norm(self, weight: Tensor) -> Tensor:
        # A row of zeros (pruned, say) stays zero.
        smallest = torch.finfo(torch.float32).tiny
        if shards.is_sharded(weight):
            operands = [weight.detach()], *([part.detach()] for part in self.factors())
            return shards.row_norms(*operands, [self.scaling])[0].clamp_min(smallest)
        return ops.row_norm(weight, *self.factors(), self.scaling).clamp_min(smallest)

    def _merge(self, clean: Tensor) -> Tensor:
        return super()._merge(clean) * (self.lora_magnitude / self._norm(clean))[:, None]

    def enter_window(self, window: Any) -> None:
        """Note ||V||, because the weight may be noisy afterwards."""
        norm = self._noisy_norm(window) if self.renorm else self._norm(self.weight)
        if self._window_norm is None or self._window_norm.device != norm.device:
            # An ordinary tensor even in inference mode: autograd saves it.
            with torch.inference_mode(False):
                self._window_norm = torch.empty_like(norm)
        self._window_norm.copy_(norm)
        super().enter_window(window)

    def _noisy_norm(self, window: Any) -> Tensor:
        """||V_i + noise||, the noisy weight made in panels of bounded size."""
        weight = self.weight.detach()
        lora_A, lora_B = self.factors()
        rows = max(_SCRATCH_BYTES // (weight.shape[1] * weight.dtype.itemsize), 1)
        norm = torch.empty_like(window.row_scale)
        with _backend.backend(window.backend):
            for begin in range(0, weight.shape[0], rows):
                part = slice(begin, begin + rows)
                noisy = ops.perturb(
                    weight[part], window.row_scale[part], window.key, row_offset=begin
                )
                norm[part] = ops.row_norm(noisy, lora_A, lora_B[part], self.scaling)
        return norm.clamp_min(torch.finfo(torch.float32).tiny)

    def extra_repr(self) -> str:
        """Sizes and options, for print(model)."""
        return super().extra_repr() + (", renorm=True" if self.renorm else "")
