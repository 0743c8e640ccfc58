"""Every op on problems drawn at random, against float64, numpy and one rounding at a time.

    FLATKERN_FUZZ=5000 python -m pytest tests/reliability/test_fuzz.py --hypothesis-seed 1

draws so many problems for each op and implementation; the seed draws the same ones again. Without
it a few fixed ones are drawn. Shapes with 0 and 1, rows with gaps, views at any alignment between
sentinels, offsets up to the ends of their ranges, values of every magnitude, NaN and infinities.
"""

import os
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import tolerances
import torch

import flatkern
from flatkern import ops

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("FLATKERN_FUZZ", "0"))
# Not in a database: a failure prints what it takes to run it again.
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
VALUES = ("typical", "wide", "bits", "zeros", "huge", "tiny")
SCALES = ("typical", "zeros", "wide", "not finite")


@dataclass(frozen=True)
class Problem:
    """A weight, its scale and where it lies; the values follow from a seed."""

    rows: int
    cols: int
    gap: int
    shift: int
    dtype: torch.dtype
    values: str
    scales: str
    seed: int
    key: tuple
    row_offset: int
    col_offset: int
    elementwise: bool

    @property
    def offsets(self):
        return {"row_offset": self.row_offset, "col_offset": self.col_offset}

    @property
    def options(self):
        return {"elementwise": self.elementwise, **self.offsets}

    def generator(self, more=0):
        return torch.Generator().manual_seed(self.seed + more)

    def key_on(self, device):
        return flatkern.NoiseKey(*self.key).to(device)

    def weight(self, device):
        return Guarded(fill(self.values, (self.rows, self.cols), self.dtype, self), self, device)

    def scale(self, device):
        scale = 0.02 * 10 ** (torch.rand(self.rows, generator=self.generator(1)) * 4 - 3)
        if self.scales == "zeros":
            scale.zero_()
        elif self.scales == "wide":
            scale = fill("wide", (self.rows,), torch.float32, self, 2).abs()
        elif self.scales == "not finite":
            scale[::2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(self.rows)[
                : len(scale[::2])
            ]
        return scale.to(device)


def fill(kind, shape, dtype, problem, more=0):
    """Values of a kind: typical weights, any exponent, any bits, and the ends of the range."""
    generator = problem.generator(more)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "bits":
        integer = INTEGERS[dtype.itemsize]
        ends = torch.iinfo(integer)
        bits = torch.randint(ends.min, ends.max, shape, generator=generator, dtype=torch.int64)
        return bits.to(integer).view(dtype)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    if kind == "wide":
        low, high = np.log10(info.smallest_normal) - 3, np.log10(info.max) - 1
        exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return (normal.sign() * 10**exponent).to(dtype)
    size = {"typical": 0.02, "huge": info.max / 4, "tiny": info.smallest_normal}[kind]
    return (normal * size).to(dtype)


class Guarded:
    """A matrix in the midst of a buffer; `check` sees a write beside it."""

    def __init__(self, values, problem, device):
        rows, cols = values.shape
        stride = max(cols, 1) + problem.gap
        size = problem.shift + rows * stride + 64
        self.buffer = torch.full((size,), 77.0, dtype=values.dtype, device=device)
        self.view = self.buffer.as_strided((rows, cols), (stride, 1), problem.shift)
        self.view.copy_(values)
        self.before = self.buffer.clone()

    def check(self, written):
        """The view is `written`, bit for bit, and nothing else has changed."""
        expected = self.before.clone()
        expected.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).copy_(
            written
        )
        tolerances.assert_same_bits(self.buffer, expected)


def near_end(limit, size):
    ends = st.integers(0, 9).map(lambda back: max(limit - size - back, 0))
    return st.one_of(st.integers(0, 9), ends, st.integers(0, limit - size))


@st.composite
def problems(draw, dtypes=DTYPES):
    cols = draw(
        st.one_of(st.integers(0, 70), st.sampled_from([127, 256, 1000, 4095, 4096, 4097, 8195]))
    )
    rows = draw(st.integers(0, 9 if cols > 70 else 40))
    word = st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1), st.just(2**32 - 1))
    return Problem(
        rows,
        cols,
        gap=draw(st.sampled_from([0, 0, 1, 3, 8])),
        shift=draw(st.integers(0, 17)),
        dtype=draw(st.sampled_from(dtypes)),
        values=draw(st.sampled_from(VALUES)),
        scales=draw(st.sampled_from(SCALES)),
        seed=draw(st.integers(0, 2**31)),
        key=tuple(draw(st.tuples(word, word, word, word))),
        row_offset=draw(near_end(2**32, rows)),
        col_offset=draw(near_end(2**34, cols)),
        elementwise=draw(st.booleans()),
    )


def all_dtypes(implementation):
    return (*DTYPES, torch.float64) if implementation.float64 else DTYPES


def given_problems(check):
    """The check on problems of the implementation's dtypes."""

    @SETTINGS
    @hypothesis.given(data=st.data())
    def test(implementation, device, data):
        check(implementation, device, data.draw(problems(all_dtypes(implementation))))

    test.__name__ = test.__qualname__ = check.__name__
    return test


@given_problems
def test_words_and_uniform_values(implementation, device, problem):
    shape, key = (problem.rows, problem.cols), problem.key_on(device)
    words = ops.philox_bits(*shape, key, **problem.offsets)
    expected = oracle.words(*shape, problem.key, **problem.offsets).astype(np.int64)
    assert torch.equal(words.cpu(), torch.from_numpy(expected))
    odd = (words.cpu() >> 7 | 1) - 2**24
    uniform = ops.uniform(*shape, key, **problem.offsets)
    tolerances.assert_same_bits(uniform.cpu(), (odd.double() * 2.0**-24).float())


@given_problems
def test_normals(implementation, device, problem):
    shape, key = (problem.rows, problem.cols), problem.key_on(device)
    z = ops.noise(*shape, key, **problem.offsets)
    exact = torch.from_numpy(oracle.normals(*shape, problem.key, **problem.offsets))
    tolerances.assert_within(z, exact, tolerances.NOISE_MAX)
    with flatkern.backend("reference"):
        reference = ops.noise(*shape, key.cpu(), **problem.offsets)
    tolerances.assert_within(z, reference, tolerances.NOISE_MAX)


@given_problems
def test_row_norms(implementation, device, problem):
    weight, rank = problem.weight(device), problem.seed % 5
    parts = (None, None)
    if rank:
        parts = (
            fill("typical", (rank, problem.cols), torch.float32, problem, 3).to(device),
            fill(problem.values, (problem.rows, rank), problem.dtype, problem, 4).to(device),
        )
    got = ops.row_norm(weight.view, *parts, 1.5).cpu()
    clean = [None if part is None else part.cpu() for part in (weight.view, *parts)]
    exact = oracle.row_norm(*clean, 1.5)
    size = oracle.row_norm_scale(*clean, 1.5)
    # What float32 holds: neither a square beyond its range, nor one below it.
    held = size.isfinite() & (size < 1e18)
    bound = tolerances.row_norm_bound(size, rank) + 4e-23 * max(problem.cols, 1) ** 0.5 + 1e-22
    tolerances.assert_within(got[held], exact[held], bound[held])
    nan = exact.isnan()
    assert got[nan].isnan().all()
    infinite = exact.isinf()
    assert not got[infinite].isfinite().any()
    assert not (got < 0).any()
    weight.check(weight.view)


@given_problems
def test_perturb_in_every_form(implementation, device, problem):
    weight, scale, key = problem.weight(device), problem.scale(device), problem.key_on(device)
    z = ops.noise(problem.rows, problem.cols, key, **problem.offsets).cpu()
    clean = weight.view.clone()
    expected = oracle.perturbed(clean.cpu(), scale.cpu(), z, elementwise=problem.elementwise)
    noisy = ops.perturb(weight.view, scale, key, **problem.options)
    size = scale[:, None] * (clean.abs().double() if problem.elementwise else 1)
    tolerances.assert_perturbed(implementation, noisy, expected, size, before=clean)
    weight.check(clean)
    out = Guarded(torch.zeros(clean.shape, dtype=clean.dtype), problem, device)
    ops.perturb(weight.view, scale, key, out=out.view, **problem.options)
    out.check(noisy)
    ops.perturb_(weight.view, scale, key, **problem.options)
    weight.check(noisy)


@given_problems
def test_a_residual_brings_every_bit_back(implementation, device, problem):
    if not implementation.residual:
        return
    weight, scale, key = problem.weight(device), problem.scale(device), problem.key_on(device)
    clean = weight.view.clone()
    noisy = ops.perturb(weight.view, scale, key, **problem.options)
    residual = ops.new_residual(weight.view, None if problem.seed % 3 else problem.seed % 4096)
    ops.perturb_(weight.view, scale, key, residual=residual, **problem.options)
    if problem.seed % 3:
        weight.check(noisy)
    ops.restore_(weight.view, scale, key, residual=residual, **problem.options)
    weight.check(clean)


@given_problems
def test_merged_and_lists_are_the_single_ops(implementation, device, problem):
    weight, key = problem.weight(device), problem.key_on(device)
    lora_A = fill("typical", (2, problem.cols), torch.float32, problem, 3).to(device)
    lora_B = fill("typical", (problem.rows, 2), torch.float32, problem, 4).to(device)
    adapters, clean = (lora_A, lora_B, 0.5), weight.view.clone()
    where = {"elementwise": problem.elementwise, "row_offset": problem.row_offset}
    c = ops.row_norm(clean, *adapters) * (0.1 / max(problem.cols, 1) ** 0.5)
    noisy = ops.perturb(clean, c, key, **where)
    got = ops.perturb_merged_(weight.view, *adapters, 0.1, key, **where)
    tolerances.assert_same_norms(implementation, got, c)
    if implementation.own_products:
        weight.check(noisy)
    twins = [problem.weight(device), Guarded(clean.cpu()[:1], problem, device)]
    views = [twin.view for twin in twins]
    ops.foreach_perturb_(
        views,
        [c, c[:1]],
        [key, key],
        elementwise=problem.elementwise,
        row_offsets=[problem.row_offset] * 2,
    )
    twins[0].check(noisy)
    twins[1].check(noisy[:1])


@given_problems
def test_planes(implementation, device, problem):
    weight, scale, key = problem.weight(device), problem.scale(device), problem.key_on(device)
    other = flatkern.NoiseKey(problem.key[0], problem.key[1], 5, problem.key[3]).to(device)
    clean = weight.view.clone()
    scales, keys = torch.stack([scale, scale.flip(0)]), torch.stack([key, other])
    got = ops.perturb_plane(weight.view, scales, keys, **problem.offsets)
    weight.check(clean)
    shape = (problem.rows, problem.cols)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    finite = torch.where(scales.isfinite(), scales, 0).cpu()
    z = [ops.noise(*shape, k, **problem.offsets).cpu() for k in (key, other)]
    e = finite[0, :, None] * z[0] + finite[1, :, None] * z[1]
    rows = clean.cpu()
    total = (rows.to(wide) + e.to(wide)).to(problem.dtype)
    expected = torch.where(rows.isfinite() & total.isfinite(), total, rows)
    size = finite.abs().sum(0)
    tolerances.assert_perturbed(implementation, got, expected, size, before=clean)


@given_problems
def test_noisy_linear(implementation, device, problem):
    """Typical values, for which eager PyTorch in the same dtype says what error is to be had."""
    if not problem.rows or not problem.cols:
        return
    key, tokens, rank = problem.key_on(device), problem.seed % 4, problem.seed % 3
    values = Guarded(
        fill("typical", (problem.rows, problem.cols), problem.dtype, problem), problem, device
    )
    scale = torch.rand(problem.rows, generator=problem.generator(1)).to(device) * 0.02
    x = torch.randn(tokens, problem.cols, generator=problem.generator(5)).to(device, problem.dtype)
    adapters = (None, None)
    if rank:
        shapes = (rank, problem.cols), (problem.rows, rank)
        adapters = tuple(fill("typical", s, problem.dtype, problem, 6).to(device) for s in shapes)
    noisy = ops.perturb(values.view, scale, key, **problem.options)
    results = []
    for weight, dtype in ((None, problem.dtype), (noisy, problem.dtype), (noisy, torch.float64)):
        own_x = x.to(dtype).clone().requires_grad_()
        own = [None if a is None else a.to(dtype).clone().requires_grad_() for a in adapters]
        if weight is None:
            y = ops.noisy_linear(own_x, values.view, None, *own, 0.5, scale, key, **problem.options)
        else:
            y = oracle.lora_product(own_x, weight.to(dtype), None, *own, 0.5)
        y.backward(torch.ones_like(y))
        results.append([y.detach(), own_x.grad, *(a.grad for a in own if a is not None)])
    # Where all but cancels, eager's error is chance: a step of the largest sum that may occur.
    largest = noisy.double().abs().sum() * x.double().abs().amax().clamp_min(1) if tokens else 0
    slack = tolerances.STEP[problem.dtype] * largest
    for got, eager, exact in zip(*results, strict=True):
        bound = tolerances.eager_bound(eager.cpu(), exact.cpu(), problem.dtype)
        tolerances.assert_within(got, exact, bound + slack)
    values.check(values.before.as_strided(values.view.shape, values.view.stride(), problem.shift))
