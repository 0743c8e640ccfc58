"""The products of noisy_linear: noisy panels in bounded scratch, then torch's own product.

Everything here runs below autograd, on checked arguments, with autocast off. It serves Triton and
the reference, and says what csrc/noisy_linear.cpp does: the same products in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flatkern._noise import Noise
from flatkern.ops._library import kernel

# Bytes of a panel of noisy weight and of a block of tokens. On a GPU layers of 7B models at 8,192
# tokens take one of each. Forward and backward of a Llama block (4096/11008, bfloat16) there, under
# a CUDA graph on an H100: 21.8 ms of plain LoRA; 26.4 with 32 MiB of each, 22.8 with blocks of
# 1 GiB, 22.65 with panels of 128 MiB as well; the peak memory of both, 2,317 MiB, is below plain
# LoRA's 2,703.
_SCRATCH_BYTES = {"cuda": (128 * 2**20, 2**30)}
_OTHER_SCRATCH_BYTES = 32 * 2**20, 32 * 2**20


def scratch_of(device_type: str, scratch_bytes: int | None) -> tuple[int, int]:
    """Bytes of a panel of noisy weight and of a block of tokens on a device."""
    if scratch_bytes is not None:
        return scratch_bytes, scratch_bytes
    return _SCRATCH_BYTES.get(device_type, _OTHER_SCRATCH_BYTES)


def flat(x: Tensor) -> Tensor:
    """[..., n] as [tokens, n]; the sizes are spelled out because n may be 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def panels(length: int, bytes_each: int, scratch_bytes: int) -> list[tuple[int, int]]:
    """Cut `length` rows, columns or tokens of `bytes_each` into ranges that fit the scratch."""
    fit = scratch_bytes // max(bytes_each, 1)
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
    noise: Noise
    dtype: torch.dtype
    backend: str | None
    panel_bytes: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W_noisy^T + b, [tokens, m], from x [tokens, n] and b [m] of the same dtype."""
        rows, cols = self.weight.shape
        cuts = panels(rows, cols * self.dtype.itemsize, self.panel_bytes)
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
        cuts = panels(cols, rows * self.dtype.itemsize, self.panel_bytes)
        scratch = grad.new_empty(rows * cuts[0][1])
        if len(cuts) == 1:
            return grad @ self._panel(scratch, self.weight, 0, 0)
        grad_x = grad.new_empty(grad.shape[0], cols)
        for begin, end in cuts:
            noisy = self._panel(scratch, self.weight[:, begin:end], 0, begin)
            torch.mm(grad, noisy, out=grad_x[:, begin:end])
        return grad_x

    def _panel(self, scratch: Tensor, weight: Tensor, row: int, col: int) -> Tensor:
        """The noisy values of `weight`, a part that begins at (row, col), dense in `scratch`."""
        out = scratch[: weight.numel()].view(weight.shape)
        noise = self.noise.part(row, weight.shape[0], col)
        run = kernel("perturb_out", weight, self.backend)
        run(weight, *noise.tensors, **noise.options, out=out)
        return out


@dataclass
class Adapters:
    """s B A with A [r, n] and B [m, r], multiplied in `dtype` and never formed.

    Everything is rounded in the order of plain LoRA's autograd, so that a noiseless layer gives its
    bits. Products with B and scaled or cast activations are made a block of tokens at a time.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dtype: torch.dtype
    block_bytes: int

    def __post_init__(self) -> None:
        """The adapters in the dtype of their products."""
        self.lora_A = self.lora_A.to(self.dtype)
        self.lora_B = self.lora_B.to(self.dtype)

    def _blocks(
        self, first: Tensor, second: Tensor | None = None
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Ranges of tokens, and the activations [tokens, ...] there in `dtype`."""
        width = max(self.lora_A.shape[1], self.lora_B.shape[0])
        tokens, activations = first.shape[0], (first, second)
        for begin, end in panels(tokens, width * self.dtype.itemsize, self.block_bytes):
            here = [None if x is None else x[begin:end].to(self.dtype) for x in activations]
            yield slice(begin, end), here

    def add_product(self, y: Tensor, x: Tensor) -> None:
        """y [tokens, m] += s (x A^T) B^T, rounded to y's dtype once."""
        for tokens, (here, _) in self._blocks(x):
            y[tokens].add_((here @ self.lora_A.t() @ self.lora_B.t()).mul_(self.scaling))

    def backward(
        self, grad: Tensor, x: Tensor | None, grad_x: Tensor | None, need_A: bool, need_B: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """grad_x += s (grad B) A; return the gradients of A and B that are asked for.

        They alone need x.
        """
        grad_A = grad_B = None
        for tokens, (grad_here, x_here) in self._blocks(grad, x):
            scaled = grad_here * self.scaling
            down = scaled @ self.lora_B if need_A or grad_x is not None else None
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
