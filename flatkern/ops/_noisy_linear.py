"""The products of noisy_linear: noisy panels in bounded scratch, then torch's own product.

Everything here runs below autograd, on checked arguments, with autocast off.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flatkern import _backend
from flatkern.ops._cost import DEFAULT_SCRATCH_BYTES, choose
from flatkern.ops._library import kernel


def flat(x: Tensor) -> Tensor:
    """[..., n] as [tokens, n]; the sizes are spelled out because n may be 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def panels(length: int, bytes_each: int, scratch_bytes: int | None) -> list[tuple[int, int]]:
    """Cut `length` rows, columns or tokens of `bytes_each` into ranges that fit the scratch."""
    fit = (scratch_bytes or DEFAULT_SCRATCH_BYTES) // max(bytes_each, 1)
    if fit >= length:
        return [(0, length)]
    # Whole cache lines and vector registers, where that many fit.
    step = fit // 64 * 64 if fit >= 64 else max(fit, 1)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


@dataclass
class NoisyWeight:
    """W_noisy [m, n] in `dtype`, which exists a panel at a time only.

    Scratch belongs to a call, so torch's allocator hands it from layer to layer, in order on each
    stream, and threads never share it.
    """

    weight: Tensor
    row_scale: Tensor
    key: Tensor
    dtype: torch.dtype
    backend: str | None
    elementwise: bool
    scratch_bytes: int | None
    row_offset: int
    col_offset: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W_noisy^T + b, [tokens, m], from x [tokens, n] and b [m] of the same dtype."""
        rows, cols = self.weight.shape
        if self._is_fused(x.shape[0], False):
            return self._fused("noisy_linear", x, bias=bias)
        cuts = panels(rows, cols * self.dtype.itemsize, self.scratch_bytes)
        scratch = x.new_empty(cuts[0][1] * cols)
        if len(cuts) == 1:
            return F.linear(x, self._panel(scratch, self.weight, 0, 0), bias)
        y = x.new_empty(x.shape[0], rows)
        for begin, end in cuts:
            noisy = self._panel(scratch, self.weight[begin:end], begin, 0).t()
            out = y[:, begin:end]
            if bias is None:
                torch.mm(x, noisy, out=out)
            else:
                torch.addmm(bias[begin:end], x, noisy, out=out)
        return y

    def product_transposed(self, grad: Tensor) -> Tensor:
        """grad W_noisy, [tokens, n], from grad [tokens, m].

        In column panels: no reduction is split, and none accumulates in 16 bits.
        """
        rows, cols = self.weight.shape
        if self._is_fused(grad.shape[0], True):
            return self._fused("noisy_linear_grad_x", grad)
        cuts = panels(cols, rows * self.dtype.itemsize, self.scratch_bytes)
        scratch = grad.new_empty(rows * cuts[0][1])
        if len(cuts) == 1:
            return grad @ self._panel(scratch, self.weight, 0, 0)
        grad_x = grad.new_empty(grad.shape[0], cols)
        for begin, end in cuts:
            noisy = self._panel(scratch, self.weight[:, begin:end], 0, begin)
            torch.mm(grad, noisy, out=grad_x[:, begin:end])
        return grad_x

    def _is_fused(self, tokens: int, transposed: bool) -> bool:
        """Whether the product makes its noise itself, which Triton's kernels alone do."""
        device, backend = self.weight.device, self.backend
        if device.type != "cuda":
            return False
        if _backend.resolve(device.type, self.weight.dtype, backend) != "triton":
            return False
        capability = torch.cuda.get_device_capability(device)
        options = {"transposed": transposed, "scratch_bytes": self.scratch_bytes}
        way = choose(tokens, *self.weight.shape, self.dtype, capability, **options)
        return way == "fused"

    def _fused(self, op: str, x: Tensor, **options: Tensor | None) -> Tensor:
        return kernel(op, self.weight, self.backend)(
            x,
            self.weight,
            self.row_scale,
            self.key,
            elementwise=self.elementwise,
            row_offset=self.row_offset,
            col_offset=self.col_offset,
            **options,
        )

    def _panel(self, scratch: Tensor, weight: Tensor, row: int, col: int) -> Tensor:
        """The noisy values of `weight`, a part that begins at (row, col), dense in `scratch`."""
        out = scratch[: weight.numel()].view(weight.shape)
        kernel("perturb_out", weight, self.backend)(
            weight,
            self.row_scale[row : row + weight.shape[0]],
            self.key,
            elementwise=self.elementwise,
            row_offset=self.row_offset + row,
            col_offset=self.col_offset + col,
            out=out,
        )
        return out


@dataclass
class Adapters:
    """s B A with A [r, n] and B [m, r], multiplied in `dtype` and never formed.

    Everything is rounded in the order of plain LoRA's autograd, so that a noiseless layer gives its
    bits. Products with B and scaled or cast activations are made a block of tokens at a time: each
    takes no more than the scratch of a noisy panel.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dtype: torch.dtype
    scratch_bytes: int | None

    def __post_init__(self) -> None:
        """The adapters in the dtype of their products."""
        self.lora_A = self.lora_A.to(self.dtype)
        self.lora_B = self.lora_B.to(self.dtype)

    def _blocks(self, *activations: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Ranges of tokens, and the activations [tokens, ...] there in `dtype`."""
        width = max(self.lora_A.shape[1], self.lora_B.shape[0])
        tokens = activations[0].shape[0]
        for begin, end in panels(tokens, width * self.dtype.itemsize, self.scratch_bytes):
            yield slice(begin, end), [x[begin:end].to(self.dtype) for x in activations]

    def add_product(self, y: Tensor, x: Tensor) -> None:
        """y [tokens, m] += s (x A^T) B^T, rounded to y's dtype once."""
        for tokens, (here,) in self._blocks(x):
            y[tokens].add_((here @ self.lora_A.t() @ self.lora_B.t()).mul_(self.scaling))

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, need_A: bool, need_B: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """grad_x += s (grad B) A; return the gradients of A and B that are asked for."""
        grad_A = grad_B = None
        for tokens, (grad_here, x_here) in self._blocks(grad, x):
            scaled = grad_here * self.scaling
            down = scaled @ self.lora_B
            if grad_x is not None:
                grad_x[tokens].add_(down @ self.lora_A)
            if need_A:
                grad_A = _plus(grad_A, down.t() @ x_here)
            if need_B:
                grad_B = _plus(grad_B, scaled.t() @ (x_here @ self.lora_A.t()))
        return grad_A, grad_B


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Their sum, in at least float32 where there are several parts."""
    if total is None:
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)
