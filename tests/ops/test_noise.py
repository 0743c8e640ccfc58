"""philox_bits, noise and uniform against published vectors, an independent Philox and float64."""

import functools
import itertools
import math
import random
from pathlib import Path

import few
import numpy as np
import oracle
import pytest
import scipy.stats
import tolerances
import torch

import flatkern

VECTORS = [
    (int(fields[1]), [int(word, 16) for word in fields[2:]])
    for line in (Path(__file__).parents[1] / "data/philox_kat.txt").read_text().splitlines()
    if (fields := line.split()) and fields[0] == "philox4x32"
]
KEY = (0x1234ABCD, 7, 3, 0x80000001)
LAST_ROW = 2**32 - 1
LAST_COL = 2**34 - 1
OPS = [flatkern.ops.noise, flatkern.ops.philox_bits, flatkern.ops.uniform]
NAMES = [op.__name__ for op in OPS]


def make_key(key, device="cpu"):
    return flatkern.NoiseKey(*key).to(device)


def philox_bits(rows, cols, key, device, **offsets):
    return flatkern.ops.philox_bits(rows, cols, make_key(key, device), **offsets)


def noise(rows, cols, key, device, **offsets):
    return flatkern.ops.noise(rows, cols, make_key(key, device), **offsets).cpu()


@pytest.mark.parametrize(("rounds", "vector"), VECTORS)
def test_oracle_equals_published_vectors(rounds, vector):
    counter, key, expected = vector[:4], vector[4:6], vector[6:]
    assert [int(word) for word in oracle.philox(counter, key, rounds)] == expected
    assert list(oracle.philox_inverse(expected, key, rounds)) == counter


def test_there_are_three_published_vectors_for_ten_rounds():
    assert [rounds for rounds, _ in VECTORS].count(10) == 3


@pytest.mark.parametrize("vector", [vector for rounds, vector in VECTORS if rounds == 10])
def test_published_vectors(device, vector):
    (row, block, tensor, draw), (seed, step), expected = vector[:4], vector[4:6], vector[6:]
    key = (seed, step, draw, tensor)
    words = philox_bits(1, 4, key, device, row_offset=row, col_offset=4 * block)
    assert words.tolist() == [expected]


@pytest.mark.parametrize(
    ("rows", "cols", "row_offset", "col_offset"),
    [
        (1, 1, 0, 0),
        (5, 9, 0, 0),
        (3, 17, 41, 1),
        (4, 6, 2**31 - 2, 2**31 - 3),
        (4, 6, 2**31 - 2, 2**33 - 3),
        (2, 21, LAST_ROW - 1, LAST_COL - 20),
        (1, 1, LAST_ROW, LAST_COL),
        (64, 100, 2**32 - 64, 2**34 - 100),
    ],
)
def test_words_equal_independent_philox(device, rows, cols, row_offset, col_offset):
    offsets = {"row_offset": row_offset, "col_offset": col_offset}
    words = philox_bits(rows, cols, KEY, device, **offsets)
    assert words.dtype == torch.int64
    assert words.device.type == device.type
    expected = oracle.words(rows, cols, KEY, **offsets)
    np.testing.assert_array_equal(words.cpu().numpy(), expected.astype(np.int64))


def test_words_at_random_coordinates(device):
    draw = random.Random(20)
    for _ in range(100):
        key = tuple(draw.randrange(2**32) for _ in range(4))
        rows, cols = draw.randrange(1, 5), draw.randrange(1, 11)
        offsets = {
            "row_offset": draw.randrange(2**32 - rows),
            "col_offset": draw.randrange(2**34 - cols),
        }
        words = philox_bits(rows, cols, key, device, **offsets)
        expected = oracle.words(rows, cols, key, **offsets)
        np.testing.assert_array_equal(words.cpu().numpy(), expected.astype(np.int64))


def test_every_word_of_the_key_matters_and_none_can_be_swapped(device):
    base = (11, 22, 33, 44)
    keys = {base, *itertools.permutations(base)}
    for position in range(4):
        for bit in (0, 15, 31):
            changed = list(base)
            changed[position] ^= 1 << bit
            keys.add(tuple(changed))
    blocks = {tuple(philox_bits(2, 4, key, device).flatten().tolist()) for key in keys}
    assert len(blocks) == len(keys) == 24 + 12


def test_coordinates_never_share_a_block(device):
    # Edge values in every coordinate: a truncated or mixed-up word would repeat a 128-bit block.
    edges = (0, 1, 2**16, 2**31, 2**32 - 1)
    seen = set()
    for seed, step, draw, tensor in itertools.product(edges, repeat=4):
        for row, block in ((0, 0), (1, 0), (0, 1), (2**32 - 1, 2**32 - 1)):
            words = oracle.philox((row, block, tensor, draw), (seed, step))
            seen.add(tuple(int(word) for word in words))
    assert len(seen) == 5**4 * 4

    seen = set()
    for row, block in itertools.product(edges, repeat=2):
        words = philox_bits(1, 4, KEY, device, row_offset=row, col_offset=4 * block)
        seen.add(tuple(words.flatten().tolist()))
    assert len(seen) == 25


def test_noise_equals_float64_box_muller(implementation, device):
    windows = [
        (700, 1003, 0, 0, KEY),
        (3, 4097, 5, 2, (0, 0, 0, 0)),
        (129, 1031, 2**31 - 64, 2**33 - 515, (1, 2**32 - 1, 5, 6)),
        (7, 33, 2**32 - 7, 2**34 - 33, (2**32 - 1,) * 4),
    ]
    errors = []
    for rows, cols, row_offset, col_offset, key in windows:
        offsets = {"row_offset": row_offset, "col_offset": col_offset}
        z = noise(rows, cols, key, device, **offsets)
        assert z.dtype == torch.float32
        assert z.shape == (rows, cols)
        exact = torch.from_numpy(oracle.normals(rows, cols, key, **offsets))
        errors.append((z.double() - exact).abs().flatten())
    errors = torch.cat(errors)
    assert errors.max() <= tolerances.NOISE_MAX
    assert (errors <= tolerances.NOISE_BULK).double().mean() >= tolerances.NOISE_BULK_SHARE
    if implementation.name == "reference":
        assert errors.max() <= tolerances.NOISE_REFERENCE


# The radius word: smallest u, u rounded to 1, the float32 neighbours of 1, ties of the conversion.
RADIUS_WORDS = (
    *(0, 1, 2, 127, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**31, 2**31 + 128),
    *(0x5A827999, 2**32 - 129, 2**32 - 256, 2**32 - 257, 2**32 - 385, 2**32 - 640, 2**32 - 2049),
    *(2**32 - 128, 2**32 - 1),
)
# The angle word: v = 0, +-1/4, +-1/2, -1 and the neighbours where int32 -> float32 rounds.
ANGLE_WORDS = (
    *(0, 1, 2**24 + 1, 2**29, 2**30 - 1, 2**30, 2**30 + 1, 2**30 + 64, 3 * 2**29, 2**31 - 65),
    *(2**31 - 64, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 192, 3 * 2**30, 7 * 2**29, 2**32 - 1),
)


def test_noise_at_chosen_words(implementation, device):
    """Philox is a bijection: invert it, and each pair of words can be asked for by its address."""
    seed, step = 99, 5
    pairs = list(itertools.product(RADIUS_WORDS, ANGLE_WORDS))
    z, exact = [], []
    for first, second in zip(pairs, reversed(pairs), strict=True):
        words = (*first, *second)
        row, block, tensor, draw = oracle.philox_inverse(words, (seed, step))
        key = (seed, step, draw, tensor)
        offsets = {"row_offset": row, "col_offset": 4 * block}
        assert philox_bits(1, 4, key, device, **offsets).tolist() == [list(words)]
        z.append(noise(1, 4, key, device, **offsets)[0])
        exact.append([float(x) for pair in (first, second) for x in oracle.box_muller(*pair)])
    z, exact = torch.stack(z), torch.tensor(exact, dtype=torch.float64)
    assert exact.abs().max() > 6.76
    assert (exact == 0).any()
    tolerances.assert_within(z, exact, tolerances.NOISE_MAX)
    if implementation.name == "reference":
        tolerances.assert_within(z, exact, tolerances.NOISE_REFERENCE)


def exact_uniform(words):
    """The middle of the word's interval of 2^-23, from -1 on, in float64."""
    return (words.astype(np.uint64) >> np.uint64(8)).astype(np.float64) * 2.0**-23 + 2.0**-24 - 1


@pytest.mark.parametrize(
    ("rows", "cols", "row_offset", "col_offset"),
    [(300, 1003, 0, 0), (3, 4097, 5, 2), (64, 100, 2**32 - 64, 2**34 - 100), (2, 7, 0, 3)],
)
def test_uniform_values_are_exact_in_every_implementation(
    implementation, device, rows, cols, row_offset, col_offset
):
    offsets = {"row_offset": row_offset, "col_offset": col_offset}
    u = flatkern.ops.uniform(rows, cols, make_key(KEY, device), **offsets).cpu()
    assert u.dtype == torch.float32
    exact = exact_uniform(oracle.words(rows, cols, KEY, **offsets))
    np.testing.assert_array_equal(u.double().numpy(), exact)
    assert u.abs().max() < 1
    assert u.abs().min() > 0


def test_uniform_at_chosen_words(implementation, device):
    """The ends are symmetric and inside (-1, 1); the words next to 0 are +-2^-24."""
    seed, step = 99, 5
    words = (0, 2**32 - 1, 2**31, 2**31 - 1)
    row, block, tensor, draw = oracle.philox_inverse(words, (seed, step))
    key = make_key((seed, step, draw, tensor), device)
    u = flatkern.ops.uniform(1, 4, key, row_offset=row, col_offset=4 * block)
    assert u.tolist() == [[2.0**-24 - 1, 1 - 2.0**-24, 2.0**-24, -(2.0**-24)]]


def test_uniform_is_uniform(implementation, device):
    """Exact values of words; that words are random, others test. 6e5 of them."""
    u = flatkern.ops.uniform(600, 1000, make_key(KEY, device)).double().cpu()
    assert abs(z_score(u, 0, 1 / 3)) < tolerances.Z_SCORE
    assert abs(z_score(u**2, 1 / 3, 4 / 45)) < tolerances.Z_SCORE
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform", (-1, 2)).pvalue > tolerances.P_VALUE


SIDE = 900
NEIGHBOURS = {
    "base": (5, 100, 2, 17),
    "seed": (6, 100, 2, 17),
    "step": (5, 101, 2, 17),
    "draw": (5, 100, 3, 17),
    "tensor": (5, 100, 2, 18),
}


@functools.cache
def sample(name, device):
    """8e5 normals for each of five neighbouring keys, as float64."""
    with flatkern.backend(name):
        return {what: noise(SIDE, SIDE, key, device).double() for what, key in NEIGHBOURS.items()}


def z_score(values, mean, variance):
    return ((values.mean() - mean) * math.sqrt(values.numel() / variance)).item()


def test_moments(implementation, device):
    z = torch.stack(list(sample(implementation.name, device).values()))
    scores = {
        1: z_score(z, 0, 1),
        2: z_score(z**2, 1, 2),
        3: z_score(z**3, 0, 15),
        4: z_score(z**4, 3, 96),
        6: z_score(z**6, 15, 10395 - 225),
    }
    assert max(map(abs, scores.values())) < tolerances.Z_SCORE, scores
    assert z.abs().max() <= tolerances.NOISE_RADIUS


def test_each_lane_is_standard_normal(implementation, device):
    z = sample(implementation.name, device)["base"]
    for lane in range(4):
        values = z[:, lane::4]
        assert abs(z_score(values, 0, 1)) < tolerances.Z_SCORE
        assert abs(z_score(values**2, 1, 2)) < tolerances.Z_SCORE
        assert abs(z_score(values**4, 3, 96)) < tolerances.Z_SCORE


def test_distribution(implementation, device):
    z = torch.cat([s.flatten() for s in sample(implementation.name, device).values()]).numpy()
    assert scipy.stats.kstest(z, "norm").pvalue > tolerances.P_VALUE
    probability = scipy.stats.norm.cdf(z)
    bins = np.bincount((probability * 4096).astype(np.int64).clip(0, 4095), minlength=4096)
    p = scipy.stats.chisquare(bins).pvalue
    # Too even is as wrong as too uneven.
    assert tolerances.P_VALUE < p < 1 - tolerances.P_VALUE


@pytest.mark.parametrize("threshold", [2.5, 3.0, 3.5, 4.0, 4.5, 5.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_tails(implementation, device, threshold, side):
    z = torch.stack(list(sample(implementation.name, device).values()))
    count = (side * z > threshold).sum().item()
    expected = scipy.stats.norm.sf(threshold)
    assert scipy.stats.binomtest(count, z.numel(), expected).pvalue > tolerances.P_VALUE


def correlation_score(x, y):
    return z_score(x * y, 0, 1), z_score((x**2 - 1) * (y**2 - 1), 0, 4)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 6, 7, 8, 64, 512])
def test_columns_and_rows_are_uncorrelated(implementation, device, lag):
    z = sample(implementation.name, device)["base"]
    scores = (
        *correlation_score(z[:, lag:], z[:, :-lag]),
        *correlation_score(z[lag:], z[:-lag]),
        *correlation_score(z[lag:, lag:], z[:-lag, :-lag]),
    )
    assert max(map(abs, scores)) < tolerances.Z_SCORE, scores


@pytest.mark.parametrize("other", ["seed", "step", "draw", "tensor"])
def test_neighbouring_keys_are_uncorrelated(implementation, device, other):
    z = sample(implementation.name, device)
    scores = (
        *correlation_score(z["base"], z[other]),
        *correlation_score(z["base"][:, 1:], z[other][:, :-1]),
        *correlation_score(z["base"][1:], z[other][:-1]),
    )
    assert max(map(abs, scores)) < tolerances.Z_SCORE, scores


def test_large_values_do_not_come_together(implementation, device):
    z = sample(implementation.name, device)["base"]
    large = (z.abs() > 2.5).double()
    share = 2 * scipy.stats.norm.sf(2.5)
    for lag in range(1, 9):
        joint = (large[:, lag:] * large[:, :-lag]).sum().item()
        trials = large[:, lag:].numel()
        assert scipy.stats.binomtest(int(joint), trials, share**2).pvalue > tolerances.P_VALUE


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_slices_and_shards_have_the_bits_of_the_whole(device, op):
    key = make_key(KEY, device)
    origin = {"row_offset": 2**31 - 11, "col_offset": 2**33 - 30}
    whole = op(37, 61, key, **origin)
    draw = random.Random(4)
    for _ in range(few.trials(80)):
        top, left = draw.randrange(37), draw.randrange(61)
        rows, cols = draw.randrange(1, 38 - top), draw.randrange(1, 62 - left)
        part = op(
            rows,
            cols,
            key,
            row_offset=origin["row_offset"] + top,
            col_offset=origin["col_offset"] + left,
        )
        tolerances.assert_same_bits(part, whole[top : top + rows, left : left + cols])


@pytest.mark.parametrize("cols", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 4097])
def test_shapes_have_the_bits_of_the_whole(device, cols):
    whole = noise(4, 4100, KEY, device)
    for rows in (1, 3, 4):
        tolerances.assert_same_bits(noise(rows, cols, KEY, device), whole[:rows, :cols])


@pytest.mark.parametrize("op", OPS, ids=NAMES)
@pytest.mark.parametrize("shape", [(513, 1027), (1, 300_001), (100_003, 3)])
def test_number_of_threads_does_not_matter(device, threads, op, shape):
    key = make_key(KEY, device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(op(*shape, key))
    tolerances.assert_same_bits(results[1], results[0])
    tolerances.assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("op", OPS, ids=NAMES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 8), (8, 0), (0, 2**34)])
def test_empty(device, op, shape):
    result = op(*shape, make_key(KEY, device))
    assert result.shape == shape
    assert result.dtype == (torch.int64 if op is flatkern.ops.philox_bits else torch.float32)


@pytest.mark.parametrize("offsets", [{"row_offset": 2**32}, {"col_offset": 2**34}])
def test_empty_at_the_very_end(device, offsets):
    shape = (0, 3) if "row_offset" in offsets else (3, 0)
    assert noise(*shape, KEY, device, **offsets).shape == shape


def test_no_global_generator_is_touched(device):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    weight = torch.ones(8, 8, device=device)
    key = make_key(KEY, device)
    flatkern.ops.philox_bits(8, 8, key)
    z = flatkern.ops.noise(8, 8, key)
    scale = flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key)
    flatkern.ops.restore_(weight, scale, key)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for now, then in zip(np.random.get_state(), before[2], strict=True):
        np.testing.assert_array_equal(now, then)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        tolerances.assert_same_bits(flatkern.ops.noise(8, 8, key), z)


def test_key_is_only_read(device):
    key = make_key(KEY, device)
    version = key._version
    flatkern.ops.noise(5, 5, key)
    assert key.tolist() == list(KEY)
    assert key._version == version


def test_noise_is_a_constant_to_autograd(device):
    with torch.enable_grad():
        assert not flatkern.ops.noise(2, 2, make_key(KEY, device)).requires_grad
