"""The CUDA kernels of the residual, run on the host by the emulator, against the reference.

`flatkern.reference` encodes from the same W, S and e; what the kernels write has to be its payload,
word for word, and their header the one that `flatkern.ops` reads.
"""

import ctypes
import math
import shutil

import pytest
import tolerances
import torch
from compiling import CPP, CUDA, compile_emulated, folder_of, link
from residuals import GRID, PACKED, RAW, gaussian, parse

from flatkern.ops import _residual
from flatkern.reference import header
from flatkern.reference import residual as reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="an installed copy has no csrc"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = (3, 14, 15, 92)
PERTURB, PERTURB_RESIDUAL, RESTORE_RESIDUAL = range(3)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = folder_of(tmp_path_factory)
    names = ("perturb", "residual", "perturb_residual", "restore_residual")
    sources = [CPP / "cuda_residual.cpp", *(CUDA / f"{name}.cu" for name in names)]
    objects = compile_emulated(sources, folder)
    target = link(objects, folder / "residual.so", "-shared", "-fsanitize=undefined")
    return ctypes.CDLL(target).run_emulated


class Tensor(ctypes.Structure):
    """A tensor of a launch, as `Tensor` in cpp/cuda_residual.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "rows", "cols", "stride")),
        ("row_scale", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("elementwise", "row_offset", "col_offset")),
        ("residual", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("implementation", ctypes.c_uint64),
    )


def run(library, op, tensors, launches, *, backwards=False):
    """Launch the kernels for `tensors`; they must take so many launches."""
    assert library(op, backwards, (Tensor * len(tensors))(*tensors), len(tensors), launches) == 0


class Window:
    """A weight, its scale and key, a residual, and the kernels run on them."""

    def __init__(self, library, weight, scale, *, pool_bytes=None, **where):
        self.library = library
        self.weight, self.scale = weight, scale
        self.key = torch.tensor(KEY)
        self.where = {"elementwise": False, "row_offset": 0, "col_offset": 0, **where}
        self.implementation, self.reversed = 77, False
        layout = _residual.layout_of(weight)
        words = layout.worst_case if pool_bytes is None else pool_bytes // 4
        self.residual = torch.zeros(layout.pool_begin + 4 * words, dtype=torch.uint8)
        # What an earlier window may have left.
        self.residual[layout.pool_begin :] = 0xA5
        header.create(self.residual, _residual.new_header(weight, words))

    def tensor(self, weight=None, **changed):
        """The tensor of a launch; it points into what this window and `changed` hold."""
        weight = self.weight if weight is None else weight
        arguments = {"row_scale": self.scale, "key": self.key, **self.where, **changed}
        return Tensor(
            weight.data_ptr(),
            DTYPES.index(weight.dtype),
            *weight.shape,
            weight.stride(0),
            arguments["row_scale"].data_ptr(),
            arguments["key"].data_ptr(),
            arguments["elementwise"],
            arguments["row_offset"],
            arguments["col_offset"],
            self.residual.data_ptr(),
            self.residual.numel(),
            changed.get("implementation", self.implementation),
        )

    def run(self, op, weight=None, **changed):
        # The kernel of the header has something to do for a weight that is empty, too.
        launches = (op != PERTURB) + (self.weight.numel() != 0)
        tensor = self.tensor(weight, **changed)
        run(self.library, op, [tensor], launches, backwards=self.reversed)

    def perturb(self, **changed):
        self.run(PERTURB_RESIDUAL, **changed)

    def restore(self, weight=None, **changed):
        self.run(RESTORE_RESIDUAL, weight, **changed)

    def header(self):
        return _residual.read(self.residual)

    def check(self):
        _residual.raise_for("check_residual", self.header())

    def noise(self):
        """e = c z of every element: what -0 becomes."""
        e = torch.full(self.weight.shape, -0.0)
        self.run(PERTURB, e, elementwise=False)
        return e


def scales(weight, c=0.004):
    return torch.full((weight.shape[0],), c) * torch.linspace(1, 2, weight.shape[0])


def assert_exact(window, compare=True):
    """A whole window: S of perturb, the reference's payloads, every bit of W afterwards."""
    before, noisy = window.weight.clone(), window.weight.clone()
    window.run(PERTURB, noisy)
    window.perturb()
    window.check()
    tolerances.assert_same_bits(window.weight, noisy)
    content = parse(window.residual, window.weight)
    assert content.state == _residual.FILLED
    if compare:
        expected = window.residual.clone()
        elementwise = window.where["elementwise"]
        pair = before.contiguous(), noisy.contiguous()
        reference.encode(*pair, window.noise(), elementwise, expected)
        should = parse(expected, window.weight)
        assert content.modes == should.modes
        assert content.payloads == should.payloads
        assert content.asked == should.asked
    window.restore()
    window.check()
    assert window.header().state == _residual.EMPTY
    tolerances.assert_same_bits(window.weight, before)
    return content


SHAPES = [(9, 1), (1200, 7), (700, 8), (300, 32), (9, 1000), (2, 4095), (2, 4096), (2, 4097)]
SHAPES += [(1, 11008), (5, 4128), (3, 1632)]


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_are_exact(library, shape, dtype, elementwise):
    weight = gaussian(shape, dtype)
    c = 0.15 if elementwise else 0.004
    assert_exact(Window(library, weight, scales(weight, c), elementwise=elementwise))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("col_offset", [0, 3, 4, 2**34 - 4200])
@pytest.mark.parametrize(("shift", "padding"), [(0, 0), (1, 3), (0, 16)])
def test_alignment_strides_and_offsets(library, dtype, col_offset, shift, padding):
    for rows, cols in ((2, 4128), (5, 1056)):
        wide = torch.full((rows, shift + cols + padding), 7.0, dtype=dtype)
        weight = wide[:, shift : shift + cols]
        weight.copy_(gaussian((rows, cols), dtype))
        assert_exact(
            Window(library, weight, scales(weight), row_offset=2**32 - 9, col_offset=col_offset)
        )
        outside = torch.cat([wide[:, :shift], wide[:, shift + cols :]], dim=1)
        assert (outside == 7).all()


@pytest.mark.parametrize("shape", [(3, 4128), (7, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(library, dtype, shape):
    residuals = []
    for backwards in (False, True):
        weight = gaussian(shape, dtype)
        weight[0, ::50] *= 1e-6
        window = Window(library, weight, scales(weight))
        window.reversed = backwards
        assert_exact(window)
        residuals.append(window.residual)
    tolerances.assert_same_bits(*residuals)


def wild(shape, dtype):
    """Random bits: NaN of any payload, infinities, denormals, -0."""
    generator = torch.Generator().manual_seed(1)
    kind, low, high = (
        (torch.int32, -(2**31), 2**31) if dtype == torch.float32 else (torch.int16, -(2**15), 2**15)
    )
    return torch.randint(low, high, shape, generator=generator, dtype=kind).view(dtype)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("cols", [4096, 1001, 352])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bits_and_any_scale(library, dtype, cols, elementwise):
    values = [0.05, 1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3e-39, 1e-30, 2e37, 300]
    scale = torch.tensor(values)
    rows = len(values)
    # Beyond float32 e is infinite, and no weight shows it.
    for weight in (wild((rows, cols), dtype), gaussian((rows, cols), dtype)):
        assert_exact(Window(library, weight, scale, elementwise=elementwise))
        window = Window(library, weight, torch.full_like(scale, 3e38), elementwise=elementwise)
        assert_exact(window, compare=False)


def test_every_mode(library):
    found = set()
    for dtype in DTYPES:
        dense = gaussian((2, 4096), dtype)
        zeros = torch.zeros(2, 4096, dtype=dtype)
        tiny, sparse = dense * 1e-6, dense.clone()
        sparse[0, ::37] = -0.0
        sparse[1, 4000:] = math.nan
        for weight in (dense, zeros, tiny, sparse):
            found |= {
                (dtype, m) for m in assert_exact(Window(library, weight, scales(weight))).modes
            }
    for kind in (torch.bfloat16, torch.float16):
        weight = gaussian((2, 4096), torch.float32).to(kind).float()
        assert assert_exact(Window(library, weight, scales(weight))).modes == [GRID, GRID]
        weight[0, 77] = weight[0, 77].nextafter(torch.tensor(9.0))
        assert assert_exact(Window(library, weight, scales(weight))).modes == [PACKED, GRID]
    assert found == {(dtype, mode) for dtype in DTYPES for mode in (PACKED, RAW)}


def windows_of_a_model(library):
    """More tensors of one form than a table holds, and others of all forms."""
    windows = []
    for index in range(64):
        form = max(0, index - 40)
        dtype, shape = DTYPES[form // 2 % 3], (index % 5, (32, 7, 32, 40)[form // 6])
        weight = gaussian((3, 4128) if index == 11 else shape, dtype)
        where = {"elementwise": form % 2 == 1, "row_offset": 10 * index}
        window = Window(library, weight, scales(weight, 0.02), **where)
        window.key = torch.tensor((3, 14, 15, index))
        windows.append(window)
    return windows


@pytest.mark.parametrize("backwards", [False, True])
def test_many_tensors_share_launches(library, backwards):
    one_by_one, together = windows_of_a_model(library), windows_of_a_model(library)
    clean = [window.weight.clone() for window in together]
    for window in one_by_one:
        window.perturb()
    tensors = [window.tensor() for window in together]
    # The headers take three tables; the chunks two of the first form, one of the eleven others.
    run(library, PERTURB_RESIDUAL, tensors, 3 + 13, backwards=backwards)
    for window, alone in zip(together, one_by_one, strict=True):
        window.check()
        tolerances.assert_same_bits(window.weight, alone.weight)
        tolerances.assert_same_bits(window.residual, alone.residual)
    # One that is refused keeps its own tensor alone.
    refused = 11
    noisy, key = together[refused].weight.clone(), torch.tensor((1, 2, 3, 4))
    tensors[refused] = together[refused].tensor(key=key)
    run(library, RESTORE_RESIDUAL, tensors, 3 + 13, backwards=backwards)
    for index, window in enumerate(together):
        if index == refused:
            with pytest.raises(RuntimeError, match="filled with seed, step, draw, tensor other"):
                window.check()
            tolerances.assert_same_bits(window.weight, noisy)
        else:
            window.check()
            assert window.header().state == _residual.EMPTY
            tolerances.assert_same_bits(window.weight, clean[index])


@pytest.mark.parametrize("missing", [0, 1, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_that_is_full(library, dtype, missing):
    clean = gaussian((3, 4500), dtype)
    window = Window(library, clean.clone(), scales(clean))
    needed = assert_exact(window).asked
    pool = 0 if missing is None else 4 * (needed - missing)
    window = Window(library, clean.clone(), scales(clean), pool_bytes=pool)
    window.perturb()
    header = window.header()
    assert (header.asked, header.clean) == (needed, {0: 0, 1: 1, None: 6}[missing])
    if header.clean:
        with pytest.raises(RuntimeError, match=f"pool_bytes={4 * needed}"):
            window.check()
    window.restore()
    tolerances.assert_same_bits(window.weight, clean)


CHANGES = {
    "seed": {"key": torch.tensor((4, 14, 15, 92))},
    "step": {"key": torch.tensor((3, 13, 15, 92))},
    "draw": {"key": torch.tensor((3, 14, 16, 92))},
    "tensor": {"key": torch.tensor((3, 14, 15, 91))},
    "row_offset": {"row_offset": 4},
    "col_offset": {"col_offset": 2},
    "elementwise": {"elementwise": True},
    "implementation": {"implementation": 78},
    "row_scale": {"row_scale": torch.tensor([0.004, 0.006, 0.008]).nextafter(torch.tensor(1.0))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_window_is_refused(library, what):
    weight = gaussian((3, 4500), torch.bfloat16)
    before = weight.clone()
    window = Window(library, weight, torch.tensor([0.004, 0.006, 0.008]), row_offset=3)
    window.perturb()
    noisy, filled = weight.clone(), window.residual.clone()
    window.restore(**CHANGES[what])
    tolerances.assert_same_bits(weight, noisy)
    said = "by another backend, build" if what == "implementation" else f"with {what} other"
    with pytest.raises(RuntimeError, match=f"residual was filled {said}"):
        window.check()
    window.residual[100:104] = 0
    tolerances.assert_same_bits(window.residual, filled)
    window.restore()
    window.check()
    tolerances.assert_same_bits(weight, before)


def test_twice_and_never(library):
    weight = gaussian((3, 4500), torch.bfloat16)
    before = weight.clone()
    window = Window(library, weight, scales(weight))
    window.restore()
    with pytest.raises(RuntimeError, match="residual is empty"):
        window.check()
    window.perturb()
    window.check()
    noisy = weight.clone()
    window.perturb(key=torch.tensor((1, 1, 1, 1)))
    with pytest.raises(RuntimeError, match="filled by an earlier"):
        window.check()
    tolerances.assert_same_bits(weight, noisy)
    window.restore()
    window.check()
    window.restore()
    with pytest.raises(RuntimeError, match="residual is empty"):
        window.check()
    tolerances.assert_same_bits(weight, before)


def test_what_is_not_this_weights_is_refused(library):
    weight = gaussian((3, 4500), torch.bfloat16)
    before = weight.clone()
    window = Window(library, weight, scales(weight))
    window.residual[0] ^= 1
    window.perturb()
    with pytest.raises(ValueError, match="other bytes"):
        window.check()
    for offset in (6, 8, 16, 72):
        window = Window(library, weight, scales(weight))
        window.residual[offset] ^= 1
        window.perturb()
        with pytest.raises(ValueError, match="another shape or dtype"):
            window.check()
    tolerances.assert_same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_changed_element_keeps_its_chunk_alone(library, dtype):
    weight = gaussian((3, 4500), dtype)
    before = weight.clone()
    window = Window(library, weight, scales(weight))
    window.perturb()
    codes = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    codes[1, 4097] ^= 1
    changed = weight.clone()
    window.restore()
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        window.check()
    assert window.header().state == _residual.FILLED
    tolerances.assert_same_bits(weight[1, 4096:], changed[1, 4096:])
    tolerances.assert_same_bits(weight[1, :4096], before[1, :4096])
    codes[1, 4097] ^= 1
    window.restore()
    window.check()
    tolerances.assert_same_bits(weight, before)


@pytest.mark.parametrize("word", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_damaged_residual_never_writes_outside(library, dtype, word):
    weight = gaussian((2, 4096), dtype)
    weight[:, 9] *= 1e-5
    before = weight.clone()
    window = Window(library, weight, scales(weight))
    window.perturb()
    noisy = weight.clone()
    content = parse(window.residual, weight)
    begin = window.residual.numel() - 4 * content.capacity
    pool = window.residual[begin:].view(torch.int32)
    if word < 0:
        # The position of the last element that is listed.
        assert content.payloads[0][0] >> 16 > 0
        word = len(content.payloads[0]) - (2 if dtype == torch.float32 else 1)
    else:
        window.residual[132:136].view(torch.int32).fill_(-2 if word else -1)
    # The fields themselves, from word 2 on, are not checked.
    if word != 2:
        pool[word] = -1
    window.restore()
    with pytest.raises(RuntimeError, match="differ"):
        window.check()
    for row in range(2):
        kept = torch.equal(weight[row], noisy[row])
        assert kept or torch.equal(weight[row], before[row])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(library, shape):
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    window = Window(library, weight, torch.ones(shape[0]))
    window.perturb()
    window.check()
    window.restore()
    window.check()


def test_the_digest_is_the_hosts(library):
    weight = gaussian((1500, 8), torch.bfloat16)
    window = Window(library, weight, torch.randn(1500, generator=torch.Generator().manual_seed(0)))
    window.perturb()
    assert window.header().row_scale == header._digest(window.scale)
    window.restore()
