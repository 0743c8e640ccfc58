"""No op needs a temporary of the weight's size: counted in torch's allocator and in the process."""

import ctypes
from pathlib import Path

import pytest
import torch

import flatkern
from flatkern import ops
from flatkern._memory import peak_bytes

ROWS, COLS, RANK = 512, 4096, 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# An op may copy the adapters to float32, 144 KiB, and return a number for each row.
SMALL = 256 << 10
NAMES = (
    *("row_norm", "perturb_", "perturb_ strided", "perturb out", "restore_", "perturb_merged_"),
    *("noisy_linear", "perturb_ with a residual", "perturb_merged_ with a residual"),
)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Inputs:
    """One weight, and calls of every op on it."""

    def __init__(self, dtype, device):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device)

        self.weight = (normal(ROWS, COLS) / COLS**0.5).to(dtype)
        self.scale = torch.full((ROWS,), 0.001, device=device)
        self.key = flatkern.NoiseKey(1, 2, 3, 4).to(device)
        self.adapters = normal(RANK, COLS), normal(ROWS, RANK), 2.0
        self.x = normal(3, COLS).to(dtype)
        self.out = torch.empty_like(self.weight)

    def call(self, name):
        """The function to measure and the bytes that it may take."""
        weight, noise = self.weight, (self.scale, self.key)
        merged = (*self.adapters, 0.1, self.key)
        if name == "noisy_linear":
            # Two panels, as a product may copy one into its own layout, gradients of adapters, and
            # what torch's products take for each thread.
            return self.linear, weight.nbytes // 4 + 3 * SMALL
        if "residual" in name:
            residual = ops.new_residual(weight)

            def window():
                c = self.scale
                if "merged" in name:
                    c = ops.perturb_merged_(weight, *merged, residual=residual)
                else:
                    ops.perturb_(weight, c, self.key, residual=residual)
                ops.restore_(weight, c, self.key, residual=residual)

            return window, SMALL
        return {
            "row_norm": lambda: ops.row_norm(weight, *self.adapters),
            "perturb_": lambda: ops.perturb_(weight, *noise),
            "perturb_ strided": lambda: ops.perturb_(weight[:, 1:], *noise),
            "perturb out": lambda: ops.perturb(weight, *noise, out=self.out),
            "restore_": lambda: ops.restore_(weight, *noise),
            "perturb_merged_": lambda: ops.perturb_merged_(weight, *merged),
        }[name], SMALL

    def linear(self):
        """Forward and backward in panels of an eighth of the weight."""
        x, lora_A, lora_B = (t.detach().requires_grad_() for t in (self.x, *self.adapters[:2]))
        panels = {"scratch_bytes": self.weight.nbytes // 8}
        inputs = x, self.weight, None, lora_A, lora_B, 2.0, self.scale, self.key
        ops.noisy_linear(*inputs, **panels).sum().backward()


def skip_unless_told(implementation, name, dtype=torch.bfloat16):
    if "residual" in name and not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    # It is here to show that the accounting sees a temporary.
    if not implementation.streams and ("residual" in name or dtype != torch.bfloat16):
        pytest.skip(f"{implementation.name} materialises what it needs")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_temporary_of_the_weights_size(implementation, device, dtype, name):
    skip_unless_told(implementation, name, dtype)
    call, bound = Inputs(dtype, device).call(name)
    call()
    peak = peak_bytes(call, device)
    if implementation.streams:
        assert peak <= bound
    else:
        # The reference materialises noise or a float32 weight: the accounting would see one.
        assert peak >= ROWS * COLS * 4


def test_a_whole_noisy_weight_is_scratch_but_not_kept(implementation, device):
    if not implementation.streams:
        pytest.skip(f"{implementation.name} materialises what it needs")
    inputs = Inputs(torch.bfloat16, device)

    def step():
        x = inputs.x.requires_grad_()
        y = ops.noisy_linear(x, inputs.weight, None, *inputs.adapters, inputs.scale, inputs.key)
        y.sum().backward()

    step()
    # One noisy weight at a time, in forward and in backward.
    assert peak_bytes(step, device) < 1.5 * inputs.weight.nbytes


def resident(field):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def peak_resident(call):
    """Bytes by which the process grew at most: malloc inside kernels, stacks, all of it."""
    try:
        # Freed pages that malloc keeps would hide a temporary.
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (OSError, AttributeError) as error:
        pytest.skip(f"the peak of this process cannot be reset: {error}")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.parametrize("name", NAMES)
def test_the_process_grows_by_no_weight(implementation, device, name):
    if device.type != "cpu" or implementation.name == "triton":
        pytest.skip("the memory of these kernels is not the process's own")
    skip_unless_told(implementation, name)
    call, bound = Inputs(torch.float32, device).call(name)
    for _ in range(2):
        call()
    peak = peak_resident(call)
    if implementation.streams:
        # Pages of stacks and of malloc's own.
        assert peak <= bound + (1 << 20)
    else:
        assert peak >= ROWS * COLS * 4
