"""Weights, keys and expectations that the tests of perturb share."""

import few
import oracle
import tolerances
import torch

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 7), (2, 8), (7, 9), (4, 16), (33, 129), (3, 1000), (2, 8230), (40, 515)]
SHAPES = few.cases(3, SHAPES)
KEY = (3, 14, 15, 92)
OFFSETS = {"row_offset": 2**32 - 4500, "col_offset": 2**33 + 7}
SENTINEL = 123.0

# Dtypes of a weight and of what it is cast to.
LOWER = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def make(shape, dtype, device="cpu", seed=0):
    """A weight of typical size, with zeros, and a scale that reaches from far below it to above."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[torch.rand(shape, generator=generator) < 0.05] = 0
    scale = 0.02 * 10 ** (torch.rand(shape[0], generator=generator) * 4 - 3)
    return weight.to(device, dtype), scale.to(device)


def make_key(device, key=KEY):
    return flatkern.NoiseKey(*key).to(device)


def expect(weight, scale, key, *, elementwise=False, dtype=None, sign=1.0, **offsets):
    rows = oracle.as_rows(weight)
    z = flatkern.ops.noise(*rows.shape, key, **offsets).cpu()
    return oracle.perturbed(
        weight.cpu(), scale.cpu(), z, elementwise=elementwise, dtype=dtype, sign=sign
    )


def noise_size(weight, scale, elementwise):
    """What z is multiplied by."""
    if not elementwise:
        return scale
    return scale.double().view(-1, *[1] * (weight.dim() - 1)) * weight.double().abs()


def check_all_forms(implementation, weight, scale, key, *, elementwise=False, **offsets):
    """perturb, out=, in place and restore of one weight; returns the noisy weight on the CPU."""
    options = {"elementwise": elementwise, **offsets}
    original = weight.clone()
    expected = expect(weight, scale, key, **options)
    noisy = flatkern.ops.perturb(weight, scale, key, **options)
    assert noisy.is_contiguous()
    assert noisy.device == weight.device
    size = noise_size(weight, scale, elementwise)
    tolerances.assert_perturbed(implementation, noisy, expected, size)
    tolerances.assert_same_bits(weight, original)

    out = torch.full_like(weight, SENTINEL)
    assert flatkern.ops.perturb(weight, scale, key, out=out, **options) is out
    tolerances.assert_same_bits(out, noisy)
    tolerances.assert_same_bits(weight, original)

    assert flatkern.ops.perturb_(weight, scale, key, **options) is None
    tolerances.assert_same_bits(weight, noisy)

    restored = expect(noisy, scale, key, sign=-1.0, **options)
    if not elementwise:
        assert flatkern.ops.restore_(weight, scale, key, **options) is None
        tolerances.assert_perturbed(implementation, weight, restored, scale, before=noisy)
    return noisy.cpu()
