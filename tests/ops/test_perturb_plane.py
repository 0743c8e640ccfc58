"""perturb_plane: two noises, one rounding at a time, in any place, and nothing else written.

What is expected is float32(W) + float32(float32(c_i z_ij) + float32(d_i y_ij)), rounded once, with
the implementation's own normals, which test_noise.py holds against the specification.
"""

import random

import few
import pytest
import tolerances
import torch
from perturb_cases import DTYPES, KEY, OFFSETS, SENTINEL, make, make_key
from test_perturb import SPECIAL_SCALES, special_weights

import flatkern

OTHER = (6, 5, 35, 8979)


def make_keys(device, first=KEY, second=OTHER):
    return torch.stack([make_key(device, first), make_key(device, second)])


def expect(weight, scales, keys, **offsets):
    rows = weight.reshape(weight.shape[0], -1)
    scales = torch.where(scales.isfinite(), scales, 0).cpu()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    z, y = (flatkern.ops.noise(*rows.shape, key, **offsets).cpu() for key in keys)
    e = scales[0, :, None] * z + scales[1, :, None] * y
    rows = rows.cpu()
    total = (rows.to(wide) + e.to(wide)).to(weight.dtype)
    return torch.where(total.isfinite() & rows.isfinite(), total, rows).view(weight.shape)


def check(implementation, weight, scales, keys, **offsets):
    original = weight.clone()
    expected = expect(weight, scales, keys, **offsets)
    noisy = flatkern.ops.perturb_plane(weight, scales, keys, **offsets)
    assert noisy.is_contiguous()
    finite = torch.where(scales.isfinite(), scales, 0).abs()
    # Two products, each of which an implementation may have folded.
    tolerances.assert_perturbed(implementation, noisy, expected, finite.sum(0))
    tolerances.assert_same_bits(weight, original)
    out = torch.full_like(weight, SENTINEL)
    assert flatkern.ops.perturb_plane(weight, scales, keys, out=out, **offsets) is out
    tolerances.assert_same_bits(out, noisy)
    before = weight._version
    flatkern.ops.perturb_plane(weight, scales, keys, out=weight, **offsets)
    assert weight._version > before
    tolerances.assert_same_bits(weight, noisy)
    return noisy


def make_plane(shape, dtype, device, seed=0):
    weight, scale = make(shape, dtype, device, seed)
    return weight, torch.stack([scale, -2 * scale.flip(0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", few.cases(3, [(1, 1), (5, 7), (7, 16), (3, 1000), (2, 8230)]), ids=str
)
def test_rounds_one_step_at_a_time(implementation, device, shape, dtype):
    weight, scales = make_plane(shape, dtype, device)
    check(implementation, weight.clone(), scales, make_keys(device))
    check(implementation, weight, scales, make_keys(device), **OFFSETS)


def test_random_shapes_strides_and_offsets(implementation, device):
    draw = random.Random(9)
    for trial in range(few.trials(15)):
        rows, cols, padding = draw.randrange(1, 12), draw.randrange(1, 90), draw.choice([0, 3, 8])
        shape = rows, cols + padding
        weight, scales = make_plane(shape, draw.choice(DTYPES), device, seed=trial)
        first = draw.randrange(padding + 1)
        check(
            implementation,
            weight[:, first : first + cols],
            scales,
            make_keys(device, *([draw.randrange(2**32) for _ in range(4)] for _ in range(2))),
            row_offset=draw.choice([0, draw.randrange(2**32 - 12)]),
            col_offset=draw.choice([0, draw.randrange(64), draw.randrange(2**34 - 90)]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_along_one_direction_it_is_perturb(device, dtype):
    weight, scales = make_plane((6, 530), dtype, device)
    weight[weight == 0] = 1  # whose sign the second noise, a zero of either sign, could change
    keys = make_keys(device)
    for axis in range(2):
        along = torch.zeros_like(scales)
        along[axis] = scales[axis]
        expected = flatkern.ops.perturb(weight, scales[axis], keys[axis])
        noisy = flatkern.ops.perturb_plane(weight, along, keys)
        tolerances.assert_same_bits(noisy, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, device, dtype):
    count = len(SPECIAL_SCALES)
    weight = special_weights(dtype).repeat(count, 3).to(device)
    weight = torch.cat([weight, torch.full((count, 64), 0.02, dtype=dtype, device=device)], 1)
    scale = torch.tensor(SPECIAL_SCALES, device=device)
    ordinary = torch.full((count,), 0.1, device=device)
    keys = make_keys(device)
    for scales in (torch.stack([scale, ordinary]), torch.stack([ordinary, scale])):
        finite = weight[:, weight[0].isfinite()].contiguous()
        check(implementation, finite, scales, keys)
        noisy = flatkern.ops.perturb_plane(weight, scales, keys).cpu()
        odd = ~weight.cpu().isfinite()
        bits, clean = tolerances.bits(noisy), tolerances.bits(weight)
        assert torch.equal(bits[odd], clean[odd])
        assert noisy[~odd].isfinite().all()


def test_other_shapes_and_float64(implementation, device):
    image, scales = make_plane((4, 2, 3, 3), torch.float32, device)
    check(implementation, image, scales, make_keys(device))
    check(implementation, image[:, 0, 0, 0].clone(), scales, make_keys(device))
    double = image.double()
    if implementation.float64:
        check(implementation, double, scales, make_keys(device))
    else:
        with pytest.raises(ValueError, match="float64"):
            flatkern.ops.perturb_plane(double, scales, make_keys(device))
    for rows, cols in ((0, 5), (5, 0)):
        empty = torch.empty(rows, cols, device=device)
        scales = torch.ones(2, rows, device=device)
        assert flatkern.ops.perturb_plane(empty, scales, make_keys(device)).shape == (rows, cols)


BAD = {
    "weight": (torch.ones(6, 12, dtype=torch.int32), "float32, bfloat16", ValueError),
    "row_scales": (torch.ones(6), r"contiguous float32 \[2, 6\]", ValueError),
    "keys": (torch.ones(4, dtype=torch.int64), r"int64 \[2, 4\]", ValueError),
    "out": (torch.ones(6, 11), r"float32 \[6, 12\]", ValueError),
    "row_offset": (2**32, "at most 4294967296", ValueError),
    "col_offset": (1.5, "int or SymInt, got float", TypeError),
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_is_named_and_nothing_is_written(argument):
    value, message, kind = BAD[argument]
    good = {
        "weight": torch.ones(6, 12),
        "row_scales": torch.ones(2, 6),
        "keys": make_keys("cpu"),
        "out": torch.ones(6, 12),
    }
    with pytest.raises(kind, match=f"perturb_plane: {argument}.*{message}"):
        flatkern.ops.perturb_plane(**good | {argument: value})
    with pytest.raises(TypeError, match=f"perturb_plane: {argument} must be"):
        flatkern.ops.perturb_plane(**good | {argument: "no"})
    assert (good["out"] == 1).all()


def test_out_must_not_overlap():
    weight = torch.ones(8, 12)
    with pytest.raises(ValueError, match="share no memory"):
        flatkern.ops.perturb_plane(weight[:6], torch.ones(2, 6), make_keys("cpu"), out=weight[2:])
