"""What a product with a noisy weight should cost, and which way to take.

Two ways lead to x W_noisy^T: write W_noisy to scratch and call the vendor's product, or make the
noise inside a product. The second saves writing and reading the weight, but makes all noise once
more for each block of tokens: it is for few. A model, on numbers that are known without a GPU.
"""

from dataclasses import dataclass

import torch

DEFAULT_SCRATCH_BYTES = 32 * 2**20

LAUNCH_SECONDS = 3e-6
# Shares of the peak that streaming kernels, and instructions in them, are expected to reach.
MEMORY_SHARE, ISSUE_SHARE = 0.9, 0.8
# Of the shorter of noise and product in one kernel, what does not hide behind the longer: a guess.
UNHIDDEN = 0.3
# Tokens that a program of the fused product holds (flatkern/triton/_launch.py).
BLOCK_TOKENS = 256
# No GPU has timed the fused product: it must promise to be this much faster.
MARGIN = 1.15


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU, and instructions per element of its kernels (bench/results/sass)."""

    flops: float  # 16-bit products, dense
    bandwidth: float  # bytes a second
    issue: float  # instructions a second: SMs x 128 lanes x clock
    perturb: float
    product: float  # x W_noisy^T at 256 tokens
    product_transposed: float


# By major compute capability. H100: measured copies and products of others; A100 and B200: data
# sheets. Smaller GPUs of a generation have less of everything, and the choice goes by ratios.
DEVICES = {
    8: Device(280e12, 1.75e12, 108 * 128 * 1.41e9, 19.5, 47.0, 46.5),
    9: Device(798e12, 3.0e12, 132 * 128 * 1.745e9, 19.5, 25.0, 30.0),
    10: Device(2000e12, 7.0e12, 148 * 128 * 1.9e9, 20.0, 26.0, 33.5),
}


def product_seconds(tokens: int, rows: int, cols: int, device: Device) -> float:
    """The vendor's product with a weight that is there, without its launch."""
    arithmetic = 2 * tokens * rows * cols / device.flops
    return max(arithmetic, 2 * rows * cols / (MEMORY_SHARE * device.bandwidth))


def scratch_seconds(tokens: int, rows: int, cols: int, device: Device) -> float:
    """`perturb` into scratch, then the product: two kernels, one after the other."""
    elements = rows * cols
    traffic = 4 * elements / (MEMORY_SHARE * device.bandwidth)
    noise = device.perturb * elements / (ISSUE_SHARE * device.issue)
    return 2 * LAUNCH_SECONDS + max(traffic, noise) + product_seconds(tokens, rows, cols, device)


def fused_seconds(
    tokens: int, rows: int, cols: int, device: Device, transposed: bool = False
) -> float:
    """The product that makes the noise itself, for each block of tokens, and adds its parts."""
    blocks = -(-tokens // BLOCK_TOKENS)
    instructions = device.product_transposed if transposed else device.product
    noise = instructions * rows * cols * blocks / (ISSUE_SHARE * device.issue)
    product = product_seconds(tokens, rows, cols, device)
    return 2 * LAUNCH_SECONDS + max(noise, product) + UNHIDDEN * min(noise, product)


def choose(
    tokens: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    transposed: bool = False,
    scratch_bytes: int | None = None,
) -> str:
    """How to multiply [tokens, cols] by the noisy [rows, cols]: "fused", "scratch" or "panels".

    Args:
        tokens, rows, cols: sizes of the product.
        dtype: of the product; in float32 the fused one would not use tensor cores.
        capability: of the GPU on which Triton runs, None elsewhere.
        transposed: the backward product, [tokens, rows] times W_noisy.
        scratch_bytes: what W_noisy may take at once; beyond, it is made panel by panel.
    """
    if dtype in (torch.bfloat16, torch.float16) and capability is not None:
        device = DEVICES[min(max(capability[0], min(DEVICES)), max(DEVICES))]
        # Blocks of tokens are whole, so that more tokens never turn the choice back.
        whole = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        fused = fused_seconds(whole, rows, cols, device, transposed)
        if MARGIN * fused < scratch_seconds(whole, rows, cols, device):
            return "fused"
    fits = rows * cols * dtype.itemsize <= (scratch_bytes or DEFAULT_SCRATCH_BYTES)
    return "scratch" if fits else "panels"
