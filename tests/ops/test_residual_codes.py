"""The ranges of the residual, element by element: every 16-bit weight under chosen noise."""

import pytest
import tolerances
import torch
from residuals import make_key, round_trip

from flatkern import ops
from flatkern.reference import bracket

INF, NAN = float("inf"), float("nan")
MASK = 0xFFFFFFFF
HALVES = [torch.bfloat16, torch.float16]


def every_code(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def noise_values(dtype, count, seed=0):
    """Noise of every size: special values, powers of two and beside them, random codes, ties."""
    special = [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, INF, -INF, NAN, 65504.0, 65519.0, -65520.0, 3.4e38]
    special += [2.0**-149, -(2.0**-149), 2.0**-133, 2.0**-134, 2.0**-126, 2.0**-24, 2.0**-25]
    for exponent in range(-140, 127, 7):
        special += [sign * m * 2.0**exponent for sign in (1, -1) for m in (1.0, 1.5, 1.2345678)]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    # Half a number of the dtype: many ties.
    ties = torch.randint(-(2**15), 2**15, (count,), generator=generator).to(torch.int16)
    typical = torch.randn(count, generator=generator) * 10.0 ** torch.arange(count).remainder(7)
    values = [torch.tensor(special), random.to(torch.int32).view(torch.float32)]
    values += [ties.view(dtype).float() * 0.5, typical * 1e-6]
    return torch.cat(values)


def noisy_of(weight, e, elementwise=False):
    """(S, whether W + e was taken): one rounding, elements that would not stay finite left."""
    wide = weight.float()
    total = (wide + (e * wide.abs() if elementwise else e)).to(weight.dtype)
    return torch.where(total.isfinite(), total, weight), total.isfinite()


def assert_in_range(weight, e, elementwise=False):
    """Where S is W + e, W is in its range unless that is wide; returns the share that is wide."""
    noisy, taken = noisy_of(weight, e, elementwise)
    base, span = bracket.bracket(noisy, e, elementwise)
    assert ((span >= 0) & (span < 256)).all()
    index = (bracket.codes(weight) - base) & MASK
    wide = (base == 0) & (span == 0)
    missed = (index > span) & taken.flatten() & ~wide
    assert not missed.any(), (weight.flatten()[missed][:5], e.flatten()[missed][:5])
    return wide.float().mean()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_is_in_its_range(dtype):
    weight = every_code(dtype)
    for e in noise_values(dtype, 30).view(-1, 1):
        assert_in_range(weight, e.expand_as(weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_at_its_ties_is_in_its_range(dtype):
    """e from W to the middle of two numbers of the dtype, and one float32 to either side of it."""
    weight, largest = every_code(dtype), torch.finfo(dtype).max
    for shift in (0, 1, 2, 3, 17, 128, 700, -1, -2, -90, -1200):
        code = (bracket.codes(weight) & 0x7FFF) + shift
        first = bracket.from_codes(code.clamp(0, 0x7FFF), weight).float().clamp(0, largest)
        after = bracket.from_codes((code + 1).clamp(0, 0x7FFF), weight).float().clamp(0, largest)
        middle = torch.copysign(first * 0.5 + after * 0.5, weight.float())
        e = middle - weight.float()
        for other in (e, torch.nextafter(e, e + 1), torch.nextafter(e, e - 1)):
            assert_in_range(weight, other)


@pytest.mark.parametrize("dtype", HALVES)
def test_elementwise_ranges(dtype):
    weight, values = every_code(dtype), torch.linspace(-4, 4, 31)
    for e in torch.cat([values, noise_values(dtype, 10)[::3]]).view(-1, 1):
        e = e.expand_as(weight)
        noisy, taken = noisy_of(weight, e, elementwise=True)
        base, span = bracket.bracket(noisy, e, True)
        wide = (base == 0) & (span == 0)
        # Noise that flips the sign takes W beyond its range, and is rare.
        same_sign = torch.signbit(noisy) == torch.signbit(weight)
        missed = ((bracket.codes(weight) - base) & MASK) > span
        unexplained = missed & taken & same_sign & ~wide & (e.abs() < 0.5)
        assert unexplained.float().mean() < 1e-3


def test_float32_of_every_size_is_in_its_range():
    generator = torch.Generator().manual_seed(2)
    count = 400_000

    def codes():
        random = torch.randint(-(2**31), 2**31, (count,), generator=generator)
        return random.to(torch.int32)

    assert_in_range(codes().view(torch.float32), codes().view(torch.float32))
    # Noise from 2^-40 to 2^20 of the weight, some of it with few bits: ties.
    for keep in (-1, -1 << 12, -1 << 16, -1 << 23):
        weight = codes()
        exponent = weight >> 23 & 255
        near = (exponent + torch.randint(-40, 21, (count,), generator=generator)).clamp(0, 254)
        e = (codes() & -0x7F800001 & keep) | near.to(torch.int32) << 23
        share = assert_in_range(weight.view(torch.float32), e.view(torch.float32))
        assert share < 0.9
    special = torch.tensor([0, 1, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 0x00800000])
    special = torch.cat([special, special - 2**31, torch.tensor([0x007FFFFF, 0x3F7FFFFF, -1])])
    special = special.to(torch.int32).view(torch.float32)
    for e in special.view(-1, 1):
        assert_in_range(special, e.expand_as(special))


def chosen_scale(target, key):
    """Row scales that give rows of one element (nearly) this noise."""
    return target / ops.noise(len(target), 1, key).flatten()


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_comes_back_under_chosen_noise(implementation, device, dtype, elementwise):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    key = make_key(device)
    weight = every_code(dtype).to(device).view(-1, 1)
    values = noise_values(dtype, 20, seed=3)
    if elementwise:
        values = torch.cat([values[:13], torch.linspace(-3, 3, 20)])
    # No multiple of the six that share an exponent: signs and mantissas take turns.
    chosen = values[::5] if implementation.streams else values[:: len(values) // 5]
    for target in chosen.to(device):
        round_trip(weight, chosen_scale(target.expand(2**16), key), key, elementwise=elementwise)
    # Ties: from each number to half-way between its neighbours.
    wide = weight.flatten().float()
    tie = torch.where(wide.isfinite(), wide * tolerances.STEP[dtype] * 0.5, 1.0)
    round_trip(weight, chosen_scale(tie, key), key)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_comes_back_under_noise_of_every_size(implementation, device, dtype):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    rows = 200 if implementation.streams else 8
    weight = every_code(dtype).to(device).expand(rows, -1).contiguous()
    generator = torch.Generator().manual_seed(7)
    scale = torch.exp2(torch.rand(rows, generator=generator) * 276 - 148).to(device)
    round_trip(weight, scale, make_key(device))
    round_trip(weight, torch.exp2(torch.log2(scale) / 40), make_key(device), elementwise=True)


def test_float32_comes_back_under_noise_of_every_size(implementation, device):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    generator = torch.Generator().manual_seed(8)
    rows = 200 if implementation.streams else 8
    codes = torch.randint(-(2**31), 2**31, (rows, 5000), generator=generator).to(torch.int32)
    scale = torch.exp2(torch.rand(rows, generator=generator) * 276 - 148).to(device)
    round_trip(codes.view(torch.float32).to(device), scale, make_key(device))
    # Sizes that meet: weights and noise between 2^-8 and 2^8.
    tame = (codes & 0x87FFFFFF) | 0x3C000000
    scale = torch.exp2(torch.log2(scale) / 18)
    round_trip(tame.view(torch.float32).to(device), scale, make_key(device))
    round_trip((tame & -1 << 12).view(torch.float32).to(device), scale, make_key(device))
