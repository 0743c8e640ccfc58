"""Every 16-bit weight under a thousand noise values, and random float32: does each bit come back?

`python -m bench.exact_residual [--values N]` perturbs and restores with a residual under the CPU
kernels and prints pairs, wrong bits and the share that was listed or raw, by its size. Exits with
1 if a bit is wrong. A row of one element has its own row scale: so each gets the noise it is given.
"""

import argparse
import sys
import time

import torch

import flatkern
from flatkern import ops
from flatkern._bits import count_changed
from flatkern.ops.residual import pool_need

KEY = flatkern.NoiseKey(1, 2, 3, 4).to("cpu")


def noise_values(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Special values, powers of two, random codes, half numbers of the dtype, typical sizes."""
    special = [0.0, -0.0, 65504.0, 65519.0, 65520.0, 3.4e38, float("inf"), float("nan"), 2.0**-149]
    special += [m * 2.0**k for k in range(-149, 128, 3) for m in (1.0, -1.0, 1.5, 1.2345678)]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    random, ties = codes.view(torch.float32), codes.to(torch.int16).view(dtype).float() * 0.5
    typical = torch.randn(count, generator=generator) * 10.0 ** -(torch.arange(count) % 7).float()
    third = count // 3
    return torch.cat([torch.tensor(special), random[:third], ties[:third], typical[:third]])


def count_wrong(weight: torch.Tensor, scale: torch.Tensor, elementwise: bool) -> tuple[int, int]:
    """Wrong bit patterns after a window, and the bytes that the residual took."""
    work, residual = weight.clone(), ops.new_residual(weight)
    ops.perturb_(work, scale, KEY, elementwise=elementwise, residual=residual)
    noisy = ops.perturb(weight, scale, KEY, elementwise=elementwise)
    wrong = count_changed(work, noisy)
    size = pool_need(residual)[0]
    ops.restore_(work, scale, KEY, elementwise=elementwise, residual=residual)
    return wrong + count_changed(work, weight), size


def report(name: str, pairs: int, wrong: int, size: int, begin: float) -> int:
    seconds = time.perf_counter() - begin
    print(f"{name}: {pairs:.3g} pairs, {wrong} wrong, {8 * size / pairs:.2f} bits, {seconds:.0f} s")
    return wrong


def every_code(dtype: torch.dtype, elementwise: bool, values: int) -> int:
    begin, total, size, pairs = time.perf_counter(), 0, 0, 0
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)
    z = ops.noise(len(weight), 1, KEY).flatten()
    for value in noise_values(dtype, values):
        # Relative noise is of the order of 1.
        value = torch.atan(value) * 2 if elementwise else value
        wrong, used = count_wrong(weight, value / z, elementwise)
        total, size, pairs = total + wrong, size + used, pairs + len(weight)
    return report(f"{dtype}, elementwise {elementwise}", pairs, total, size, begin)


def random_float32(values: int) -> int:
    begin, total, size, pairs = time.perf_counter(), 0, 0, 0
    generator = torch.Generator().manual_seed(1)
    for i in range(max(values // 30, 1)):
        codes = torch.randint(-(2**31), 2**31, (64, 16384), generator=generator).to(torch.int32)
        if i % 3:
            # Weights and noise of sizes that meet; every third time on a grid.
            codes = (codes & 0x87FFFFFF) | 0x3C000000
        if i % 3 == 2:
            codes &= -1 << 16
        scale = torch.exp2(torch.rand(64, generator=generator) * (16 if i % 3 else 276) - 8)
        wrong, used = count_wrong(codes.view(torch.float32), scale, False)
        total, size, pairs = total + wrong, size + used, pairs + codes.numel()
    return report("torch.float32", pairs, total, size, begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.exact_residual")
    parser.add_argument("--values", type=int, default=1500, help="noise values (about)")
    values = parser.parse_args().values
    with flatkern.backend("cpu"):
        wrong = random_float32(values)
        for dtype in (torch.bfloat16, torch.float16):
            for elementwise in (False, True):
                wrong += every_code(dtype, elementwise, values)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
