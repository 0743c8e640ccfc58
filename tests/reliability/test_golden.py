"""Bits that must not change while the noise's version stays: committed, and made again here.

Words are the same in every implementation. The CPU kernels' normals, noisy weights and residuals
are the same on every processor that fuses multiply-add, with every torch; the reference goes by
torch's log and cos, and GPUs by their hardware's, which their own versions may move: of those the
normals are held to the tolerance of docs/noise.md. After a change of `NOISE_VERSION`,
`python tests/reliability/test_golden.py` prints the new file.
"""

import hashlib
import json
from pathlib import Path

import pytest
import tolerances
import torch

import flatkern
from flatkern import _version, ops
from flatkern.ops.residual import pool_need

GOLDEN = Path(__file__).parents[1] / "data" / "golden.json"
# Across a residual's chunk, a word of columns and 2^32 words.
SHAPE, KEY = (5, 4103), (1, 2, 3, 4)
OFFSETS = {"row_offset": 2**20 + 1, "col_offset": 2**33 + 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def digest(tensor):
    return hashlib.sha256(tolerances.bits(tensor).numpy().tobytes()).hexdigest()


def weight_of(dtype):
    """By exact arithmetic: no generator that may change."""
    numbers = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int64) * 2654435761 % 2**20
    return ((numbers - 2**19).double() * 2.0**-23).view(SHAPE).to(dtype)


def operands(device):
    scale = torch.tensor([0.0, 1e-4, 0.003, 0.02, 0.5])
    return scale.to(device), flatkern.NoiseKey(*KEY).to(device)


def words(device):
    return digest(ops.philox_bits(*SHAPE, operands(device)[1], **OFFSETS))


def normals(device):
    return ops.noise(*SHAPE, operands(device)[1], **OFFSETS)


def kernels(device):
    """Everything that the CPU kernels make, by name."""
    made = {"normals": digest(normals(device))}
    scale, key = operands(device)
    for dtype in DTYPES:
        weight = weight_of(dtype).to(device)
        name = str(dtype).removeprefix("torch.")
        residual = ops.new_residual(weight)
        ops.perturb_(weight, scale, key, residual=residual, **OFFSETS)
        made[f"noisy {name}"] = digest(weight)
        # Where chunks lie in the pool is up to threads, and the header names the build: the modes
        # of the chunks and the words that they took are left.
        directory = residual[128 : 128 + 4 * 2 * SHAPE[0]].view(torch.int32)
        made[f"chunks {name}"] = (directory & 3).tolist()
        made[f"pool bytes {name}"] = pool_need(residual)[0]
    return made


def test_words(device):
    assert words(device) == json.loads(GOLDEN.read_text())["words"]


def test_first_normals(device):
    golden = [float.fromhex(value) for value in json.loads(GOLDEN.read_text())["first normals"]]
    expected = torch.tensor(golden, dtype=torch.float64)
    tolerances.assert_within(normals(device)[0, :16], expected, tolerances.NOISE_MAX)


def test_kernels_of_the_cpu():
    if "cpu" not in flatkern.available_backends("cpu"):
        pytest.skip("no CPU kernels")
    info = Path("/proc/cpuinfo")
    if info.exists() and "x86" in info.read_text() and " fma" not in info.read_text():
        pytest.skip("a processor without fused multiply-add may differ in last bits")
    with flatkern.backend("cpu"):
        assert kernels("cpu") == json.loads(GOLDEN.read_text())["cpu"]


def test_the_version_is_the_files():
    assert json.loads(GOLDEN.read_text())["noise_version"] == _version.NOISE_VERSION


if __name__ == "__main__":
    with flatkern.backend("cpu"):
        golden = {
            "noise_version": _version.NOISE_VERSION,
            "words": words("cpu"),
            "first normals": [float(z).hex() for z in normals("cpu")[0, :16]],
            "cpu": kernels("cpu"),
        }
    print(json.dumps(golden, indent=1))
