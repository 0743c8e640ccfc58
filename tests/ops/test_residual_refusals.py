"""What a residual refuses: another weight, window or backend, a full pool, a second time."""

from pathlib import Path

import pytest
import tolerances
import torch
from residuals import constant, gaussian, make_key, parse

import flatkern
from flatkern import ops
from flatkern._version import NOISE_VERSION
from flatkern.reference import header

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (5, 4500)
REFUSED = slice(100, 104)


@pytest.fixture(autouse=True)
def has_residual(request):
    if "implementation" in request.fixturenames:
        implementation = request.getfixturevalue("implementation")
        if not implementation.residual and "without_it" not in request.node.name:
            pytest.skip(f"{implementation.name} has no residual")
        if implementation.name == "cuda":
            pytest.skip("refuses at check_residual: test_cuda_residual.py and test_gpu.py")


class Window:
    """A perturbed weight with what is needed to restore it."""

    def __init__(self, device, dtype=torch.bfloat16, pool_bytes=None):
        self.clean = gaussian(SHAPE, dtype, device)
        self.weight = self.clean.clone()
        self.residual = ops.new_residual(self.weight, pool_bytes)
        self.arguments = {
            "row_scale": constant(self.weight, 0.003),
            "key": make_key(device),
            "elementwise": False,
            "row_offset": 3,
            "col_offset": 6,
        }
        ops.perturb_(self.weight, residual=self.residual, **self.arguments)
        self.noisy, self.filled = self.weight.clone(), self.residual.clone()

    def restore(self, **changed):
        ops.restore_(self.weight, **{"residual": self.residual, **self.arguments, **changed})

    def assert_untouched(self):
        tolerances.assert_same_bits(self.weight, self.noisy)
        # But for the word that says why.
        self.residual[REFUSED] = 0
        tolerances.assert_same_bits(self.residual, self.filled)

    def assert_still_restores(self):
        self.restore()
        tolerances.assert_same_bits(self.weight, self.clean)


def other_scale(window):
    scale = window.arguments["row_scale"].clone()
    scale[3] = torch.nextafter(scale[3], scale[3] * 2)
    return scale


CHANGES = {
    "seed": lambda w: {"key": make_key(w.weight.device, (4, 14, 15, 92))},
    "step": lambda w: {"key": make_key(w.weight.device, (3, 13, 15, 92))},
    "draw": lambda w: {"key": make_key(w.weight.device, (3, 14, 16, 92))},
    "tensor": lambda w: {"key": make_key(w.weight.device, (3, 14, 15, 91))},
    "row_scale": lambda w: {"row_scale": other_scale(w)},
    "row_offset": lambda w: {"row_offset": 4},
    "col_offset": lambda w: {"col_offset": 2},
    "elementwise": lambda w: {"elementwise": True},
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_window_is_refused(device, dtype, what):
    window = Window(device, dtype)
    version = window.weight._version
    with pytest.raises(RuntimeError, match=f"residual was filled with {what}"):
        window.restore(**CHANGES[what](window))
    assert window.weight._version == version
    window.assert_untouched()
    window.assert_still_restores()


def test_rows_of_the_scale_that_are_swapped_are_another_scale(device):
    weight = gaussian(SHAPE, torch.bfloat16, device)
    scale, key = torch.linspace(0.001, 0.002, 5, device=device), make_key(device)
    residual = ops.new_residual(weight)
    ops.perturb_(weight, scale, key, residual=residual)
    with pytest.raises(RuntimeError, match="row_scale"):
        ops.restore_(weight, scale.flip(0), key, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_weight_is_refused(device, dtype):
    window = Window(device, dtype)
    other = gaussian(SHAPE, dtype, device, seed=1)
    before = other.clone()
    with pytest.raises(RuntimeError, match="10 chunks of it differ"):
        ops.restore_(other, residual=window.residual, **window.arguments)
    tolerances.assert_same_bits(other, before)
    with pytest.raises(RuntimeError, match="10 chunks of it differ"):
        ops.check_residual(window.residual)
    window.assert_still_restores()
    ops.check_residual(window.residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_element_keeps_its_chunk_alone(device, dtype):
    window = Window(device, dtype)
    codes = window.weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    codes[2, 4097] ^= 1
    changed = window.weight.clone()
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        window.restore()
    tolerances.assert_same_bits(window.weight[2, 4096:], changed[2, 4096:])
    rest = torch.ones(SHAPE, dtype=torch.bool, device=device)
    rest[2, 4096:] = False
    tolerances.assert_same_bits(window.weight[rest], window.clean[rest])
    with pytest.raises(RuntimeError, match="filled by an earlier"):
        ops.perturb_(window.weight, residual=window.residual, **window.arguments)
    # Put back, the chunk is restored as well.
    codes[2, 4097] ^= 1
    window.assert_still_restores()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_changed_places_keep_their_chunk(device, dtype):
    window = Window(device, dtype)
    window.weight[0, :2] = window.weight[0, :2].flip(0)
    assert window.weight[0, 0] != window.weight[0, 1]
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        window.restore()
    window.weight[0, :2] = window.weight[0, :2].flip(0)
    window.assert_still_restores()


@pytest.mark.parametrize("word", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_damaged_residual_never_writes_outside(device, dtype, word):
    window = Window(device, dtype)
    begin = window.residual.numel() - 4 * parse(window.residual, window.weight).capacity
    pool = window.residual[begin:].view(torch.int32)
    pool[word] = -1
    entries = window.residual[128:].view(torch.int32)
    entries[3] = -2 if word else entries[3]
    with pytest.raises(RuntimeError, match="differ"):
        window.restore()
    tolerances.assert_same_bits(window.weight[4], window.clean[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_damaged_list_never_writes_outside(device, dtype):
    # Weights far below the noise are listed, at the end of the payload.
    weight = gaussian((1, 4096), dtype, device)
    weight[0, 9] *= 1e-5
    scale, key, before = constant(weight, 0.01), make_key(device), weight.clone()
    residual = ops.new_residual(weight)
    ops.perturb_(weight, scale, key, residual=residual)
    noisy, content = weight.clone(), parse(residual, weight)
    assert content.payloads[0][0] >> 16 > 0
    last = residual.numel() - 4 * (content.capacity - content.asked)
    entry = residual[: last - (4 if dtype == torch.float32 else 0)][-4:].view(torch.int32)
    kept = entry.clone()
    entry.fill_(-1)
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        ops.restore_(weight, scale, key, residual=residual)
    tolerances.assert_same_bits(weight, noisy)
    entry.copy_(kept)
    # The bits of the stream, written down in the payload's first word, are counted again.
    begin = residual.numel() - 4 * content.capacity
    residual[begin] ^= 1
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        ops.restore_(weight, scale, key, residual=residual)
    residual[begin] ^= 1
    ops.restore_(weight, scale, key, residual=residual)
    tolerances.assert_same_bits(weight, before)


def test_perturbed_twice(device):
    window = Window(device)
    with pytest.raises(RuntimeError, match="filled by an earlier perturb_"):
        ops.perturb_(window.weight, residual=window.residual, **window.arguments)
    window.assert_untouched()
    window.assert_still_restores()


def test_restored_twice_or_never_filled(device):
    window = Window(device)
    window.restore()
    with pytest.raises(RuntimeError, match="residual is empty"):
        window.restore()
    tolerances.assert_same_bits(window.weight, window.clean)
    with pytest.raises(RuntimeError, match="residual is empty"):
        window.restore(residual=ops.new_residual(window.weight))
    tolerances.assert_same_bits(window.weight, window.clean)


def wrong_residuals(weight):
    good = ops.new_residual(weight)
    shifted = torch.zeros(good.numel() + 8, dtype=torch.uint8, device=weight.device)[8:]
    shifted.copy_(good)
    yield "dtype", good.view(torch.int32)
    yield "2-D", good.view(1, -1)
    yield "too short", good[:100]
    yield "no directory", good[:160]
    yield "pool cut", good[:-16]
    yield "not contiguous", torch.cat([good, good])[::2]
    yield "other bytes", torch.zeros_like(good)
    yield "shifted in memory", shifted
    yield "meta", good.to("meta")
    yield "other shape", ops.new_residual(weight[:, :4499])
    yield "other rows", ops.new_residual(weight[:4])
    yield "transposed", ops.new_residual(weight.view(4500, 5))
    for dtype in DTYPES:
        if dtype != weight.dtype:
            yield "other dtype", ops.new_residual(weight.to(dtype))


@pytest.mark.parametrize("op", ["perturb_", "restore_", "perturb_merged_"])
def test_what_is_not_this_weights_residual_is_refused(device, op):
    weight = gaussian(SHAPE, torch.bfloat16, device)
    before, key = weight.clone(), make_key(device)
    scale = constant(weight, 0.01)
    arguments = (None, None, 1.0, 0.1, key) if op == "perturb_merged_" else (scale, key)
    for name, residual in wrong_residuals(weight):
        with pytest.raises(ValueError, match=f"{op}: residual must be") as caught:
            getattr(ops, op)(weight, *arguments, residual=residual)
        assert "got" in str(caught.value), name
        tolerances.assert_same_bits(weight, before)


@pytest.mark.parametrize("op", ["perturb_", "restore_", "perturb_merged_"])
def test_backends_without_it_say_which_have_one(implementation, device, op):
    if implementation.residual:
        pytest.skip("has one")
    weight = torch.ones(6, 12, device=device)
    residual = torch.zeros(1000, dtype=torch.uint8, device=device)
    key = make_key(device)
    arguments = (
        (None, None, 1.0, 0.1, key) if op == "perturb_merged_" else (constant(weight, 1.0), key)
    )
    for function in (
        lambda: getattr(ops, op)(weight, *arguments, residual=residual),
        lambda: ops.new_residual(weight),
    ):
        with pytest.raises(ValueError, match=r"residual.* are cpu, cuda and reference"):
            function()
    assert (weight == 1).all()


def test_another_backend_is_refused(implementation, device):
    window = Window(device)
    others = [
        name for name in flatkern.available_backends(device.type) if name in ops._residual.BACKENDS
    ]
    for name in set(others) - {implementation.name}:
        with flatkern.backend(name):
            with pytest.raises(RuntimeError, match="another backend"):
                window.restore()
            window.assert_untouched()
    window.assert_still_restores()


def test_an_empty_residual_serves_another_backend(implementation, device):
    weight, key = gaussian(SHAPE, torch.bfloat16, device), make_key(device)
    with flatkern.backend("reference"):
        residual = ops.new_residual(weight)
    work = weight.clone()
    ops.perturb_(work, constant(weight, 0.1), key, residual=residual)
    ops.restore_(work, constant(weight, 0.1), key, residual=residual)
    tolerances.assert_same_bits(work, weight)


def words_needed(device, dtype):
    window = Window(device, dtype)
    return parse(window.filled, window.weight).asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [0, 1, 200, None])
def test_pool_that_is_full(device, dtype, missing, threads):
    threads(1)
    needed = words_needed(device, dtype)
    pool = 0 if missing is None else 4 * (needed - missing)
    window = Window(device, dtype, pool_bytes=pool)
    content = parse(window.residual, window.weight)
    left_out = content.modes.count(0)
    assert (content.asked, content.clean, content.capacity) == (needed, left_out, pool // 4)
    assert left_out == {0: 0, 1: 1, None: 10}.get(missing, left_out)
    assert ops.residual.pool_need(window.residual) == (4 * needed, left_out)
    if left_out:
        with pytest.raises(RuntimeError, match=f"pool_bytes={4 * needed}"):
            ops.check_residual(window.residual)
    else:
        ops.check_residual(window.residual)
    # A chunk is perturbed as a whole or not at all.
    noisy = ops.perturb(window.clean, **window.arguments)
    for chunk, mode in enumerate(content.modes):
        row, begin = chunk // 2, chunk % 2 * 4096
        place = slice(row, row + 1), slice(begin, begin + 4096)
        expected = window.clean if mode == 0 else noisy
        tolerances.assert_same_bits(window.weight[place], expected[place])
    window.assert_still_restores()
    ops.check_residual(window.residual)
    # Grown to what was asked for, the same window fits.
    grown = ops.new_residual(window.weight, 4 * content.asked)
    ops.perturb_(window.weight, residual=grown, **window.arguments)
    ops.check_residual(grown)
    tolerances.assert_same_bits(window.weight, noisy)
    ops.restore_(window.weight, residual=grown, **window.arguments)
    tolerances.assert_same_bits(window.weight, window.clean)


def test_a_smaller_window_reports_nothing_of_a_larger_one(device):
    weight, key = gaussian(SHAPE, torch.bfloat16, device), make_key(device)
    residual = ops.new_residual(weight, 4 * 200)
    large, small = constant(weight, 0.01), constant(weight, 1e-6)
    ops.perturb_(weight, large, key, residual=residual)
    with pytest.raises(RuntimeError, match="no room"):
        ops.check_residual(residual)
    ops.restore_(weight, large, key, residual=residual)
    ops.perturb_(weight, small, key, residual=residual)
    ops.check_residual(residual)


def test_version_counters(device):
    weight, key = gaussian(SHAPE, torch.bfloat16, device), make_key(device)
    scale, residual = constant(weight, 0.01), ops.new_residual(weight)
    for call in (
        lambda: ops.perturb_(weight, scale, key, residual=residual),
        lambda: ops.restore_(weight, scale, key, residual=residual),
        lambda: ops.perturb_merged_(weight, None, None, 1.0, 0.1, key, residual=residual),
    ):
        before = weight._version, residual._version
        call()
        assert weight._version > before[0]
        assert residual._version > before[1]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("pool_bytes", -1, ValueError),
        ("pool_bytes", 1.5, TypeError),
        ("pool_bytes", True, TypeError),
        ("weight", [1.0], TypeError),
        ("weight", torch.ones(3, dtype=torch.int32), ValueError),
        ("weight", torch.ones(4, 6).T, ValueError),
    ],
)
def test_bad_arguments_of_new_residual(argument, value, error):
    arguments = {"weight": torch.ones(4, 6), argument: value}
    with pytest.raises(error, match=f"new_residual: {argument} must"):
        ops.new_residual(**arguments)


def test_bad_arguments_of_check_residual():
    with pytest.raises(TypeError, match="check_residual: residual must be Tensor"):
        ops.check_residual(None)
    for bad in (torch.ones(400), torch.ones(20, dtype=torch.uint8), torch.ones(2, 300).byte()):
        with pytest.raises(ValueError, match="check_residual: residual must be what new_residual"):
            ops.check_residual(bad)
    with pytest.raises(ValueError, match="other bytes"):
        ops.check_residual(torch.ones(400, dtype=torch.uint8))


def test_one_noise_version_for_all(monkeypatch):
    """What fills a residual with other noise refuses it, in each implementation."""
    philox = Path(__file__).parents[2] / "csrc" / "philox.h"
    if philox.is_file():
        assert f"constexpr int kNoiseVersion = {NOISE_VERSION};" in philox.read_text()
    built = flatkern.build_info()["extension"]
    if not isinstance(built, str):
        assert built["noise_version"] == NOISE_VERSION
    with flatkern.backend("reference"):
        window = Window(torch.device("cpu"))
        monkeypatch.setattr(header, "NOISE_VERSION", NOISE_VERSION + 1)
        header._implementation.cache_clear()
        with pytest.raises(RuntimeError, match="another backend, build"):
            window.restore()
        monkeypatch.undo()
        header._implementation.cache_clear()
        window.assert_still_restores()
