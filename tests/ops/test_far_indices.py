"""Indices and shapes beyond 2**31."""

import pytest
import tolerances
import torch

import flatkern

KEY = (1, 2, 3, 4)
OPS = torch.ops.flatkern
ROW_STRIDE = 2**33


@pytest.fixture
def far_rows(tmp_path, device):
    """Two rows 2**33 elements apart in a sparse file of 16 GiB; a few of its pages are touched."""
    if device.type != "cpu":
        pytest.skip("a mapped file is CPU memory")
    path = tmp_path / "sparse"
    size = ROW_STRIDE + 64
    try:
        with open(path, "wb") as file:
            file.truncate(2 * size)
        if path.stat().st_blocks > 1024:
            pytest.skip("the file system keeps no sparse files")
        storage = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"16 GiB of address space cannot be mapped: {error}")
    return lambda first: storage[first:].as_strided((2, 8), (ROW_STRIDE, 1))


@pytest.mark.parametrize(
    "op", ["perturb_", "restore_", "perturb_merged_", "perturb", "out", "row_norm", "noisy_linear"]
)
def test_index_arithmetic_beyond_32_bits(device, far_rows, op):
    ops = flatkern.ops
    key = flatkern.NoiseKey(*KEY).to(device)
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = torch.full((2,), 0.5)
    x = torch.eye(8, dtype=torch.bfloat16, requires_grad=True)

    def run(weight, out):
        if op == "out":
            ops.perturb(weight, scale, key, out=out)
            return out
        if op == "perturb":
            return ops.perturb(weight, scale, key)
        if op == "row_norm":
            return ops.row_norm(weight)
        if op == "noisy_linear":
            x.grad = None
            y = ops.noisy_linear(x, weight, None, None, None, 1.0, scale, key)
            y.sum().backward()
            return torch.cat([y.detach(), x.grad], -1)
        if op == "perturb_merged_":
            ops.perturb_merged_(weight, None, None, 1.0, 0.5, key)
        else:
            getattr(ops, op)(weight, scale, key)
        return weight

    weight, before, after = far_rows(16), far_rows(8), far_rows(24)
    weight.copy_(values)
    result = run(weight, out=far_rows(32))
    tolerances.assert_same_bits(result, run(values.clone(), out=torch.empty_like(values)))
    assert (before == 0).all()
    assert (after == 0).all()


def test_shapes_beyond_32_bits_are_described_without_memory():
    key = torch.empty(4, dtype=torch.int64, device="meta")
    weight = torch.empty(2**20, 2**20, dtype=torch.bfloat16, device="meta")
    scale = torch.empty(2**20, device="meta")
    assert OPS.noise(2**32, 4, key).shape == (2**32, 4)
    assert OPS.philox_bits(2, 2**34, key).shape == (2, 2**34)
    assert OPS.uniform(2, 2**34, key).shape == (2, 2**34)
    assert OPS.perturb(weight, scale, key, dtype=torch.float16).dtype == torch.float16
    assert OPS.row_norm(weight).shape == (2**20,)
    assert OPS.perturb_(weight, scale, key) is None
