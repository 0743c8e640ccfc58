"""What the compilers made of the kernels, without a GPU: instructions, widths, spills.

A layout that narrows stores, goes through shared memory or spills costs a multiple on a GPU, and no
result shows it. `python -m bench.sass` writes the table of all kernels.
"""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

import flatkern

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)
pytest.importorskip("tabulate")
pytest.importorskip("triton", reason="Triton's package has the disassembler")

from bench import sass  # noqa: E402

EXTENSION = flatkern.build_info()["extension"]

# Instructions per element, the most over sm_80, sm_90 and sm_100 and over the compilers of the
# oldest and the newest torch, rounded up: the noise alone is 17 of them.
CUDA_CEILINGS = {
    "noise_kernel<true>": 18.5,
    "perturb": 20.5,
    "perturb elementwise": 21.5,
    # Of float32; 16-bit dtypes have their own.
    "restore": 22.0,
    # Divides.
    "restore elementwise": 34.0,
}
# Where one instruction multiplies two floats, or adds a half to a float.
CUDA_CEILINGS_SM_100 = {
    # Of float32 to 16 bits.
    "perturb": 21.0,
    "perturb elementwise": 20.0,
    "restore": 18.5,
    "restore elementwise": 33.5,
}
# The pass that matters most: a 16-bit weight in place, one vector at a time 19.0 and 17.0. That the
# next two vectors are loaded meanwhile costs an instruction, and hides the memory's latency.
IN_PLACE_16, IN_PLACE_16_SM_100 = 20.0, 18.0
# Of the way that most warps take: without lists, raw chunks and what is not finite.
RESIDUAL_CEILINGS = {
    "perturb_residual_kernel": {"16": 49.5, "16 elementwise": 67.0, "32": 84.0},
    "restore_residual_kernel": {"16": 46.5, "16 elementwise": 62.0, "32": 76.0},
}
TRITON_CEILINGS = {
    "noise": 16.0,
    "philox_bits": 22.0,
    # Philox, of which normals have the same, and three instructions more.
    "uniform": 16.0,
    "perturb": 20.5,
    "perturb elementwise": 21.5,
    "restore": 20.5,
    "restore elementwise": 44.0,
    # Two noises.
    "perturb_plane": 40.5,
}
# Of the way through the loop over W, by the blocks of 16 ranks that go together and the
# dtype: W's parts are made in it.
ROW_NORM_CEILINGS = {
    ("0", "BFloat16"): 4.0,
    ("1", "BFloat16"): 6.0,
    ("2", "BFloat16"): 8.0,
    ("0", "Float16"): 4.5,
    ("1", "Float16"): 10.0,
    ("2", "Float16"): 13.0,
    ("0", "float"): 3.5,
    ("1", "float"): 12.5,
    ("2", "float"): 15.0,
}
# Bytes of stack: around 64-bit divisions, which are calls, and on sm_100 what row norms of float16
# and float32 keep there. Of rows that are not aligned a residual in float32 keeps two registers,
# and on sm_100 so does a plane in float16.
CUDA_STACK = {
    "row_norm_prepare_kernel": 32,
    "row_norm_kernel": 32,
    "perturb_residual_kernel": 8,
    "perturb_plane_kernel": 8,
}


def assert_streams(report, ceiling):
    """The hot part moves 128 bits at a time, in registers, within the ceiling."""
    assert report.per_element is not None, "no store of 128 bits"
    assert set(report.stores) == {"128"}
    assert set(report.loads) <= {"128"}
    assert report.shared == 0
    assert report.per_element <= ceiling


def assert_no_spills(report):
    assert (report.spills, report.spill_bytes) == (0, 0)


# Each takes seconds to compile: every op, dtype and form is among them, but not every form of every
# dtype on every architecture. `python -m bench.sass` has them all.
EVERYWHERE = (
    "noise",
    "restore_ bfloat16",
    "perturb_ bfloat16",
    "perturb_ bfloat16 unaligned",
    "perturb_ float16 elementwise",
    "restore_ float32 elementwise",
    "perturb_plane float16",
    "row_norm float32 rank 16",
)
SM_90 = (
    *EVERYWHERE,
    "philox_bits",
    "uniform",
    *("perturb_ float32", "perturb_ float16", "restore_ float32", "restore_ float16"),
    *("perturb float32 to bfloat16", "perturb bfloat16 to float16"),
    *("row_norm bfloat16 rank 0", "row_norm bfloat16 rank 16", "row_norm bfloat16 rank 64"),
    "row_norm float16 rank 16",
)
TRITON_WANTED = [
    (name, arch) for arch in sass.ARCHS for name in (SM_90 if arch == 90 else EVERYWHERE)
]


@pytest.fixture(scope="module")
def triton_reports():
    from bench import sass_triton

    if "PYTEST_XDIST_WORKER" in os.environ:
        # The other cores have work: processes for them would only import torch again.
        found = [sass_triton.report(*one) for one in TRITON_WANTED]
    else:
        found = sass_triton.reports(TRITON_WANTED)
    return dict(zip(TRITON_WANTED, found, strict=True))


@pytest.mark.parametrize(("name", "arch"), TRITON_WANTED)
def test_triton(triton_reports, name, arch):
    report = triton_reports[name, arch]
    op = name.split()[0].rstrip("_")
    # Two registers of the row norm on sm_80, which has fewer ways to load than its successors.
    if (op, arch) == ("row_norm", 80):
        assert report.spill_bytes <= 8
    else:
        assert_no_spills(report)
    if op == "row_norm":
        assert "128" in report.loads
        assert (report.products > 0) == ("rank 0" not in name)
    elif op == "philox_bits":
        # Not in any training step; the oldest Triton pairs its words through shared memory.
        assert set(report.stores) == {"128"}
        assert report.per_element <= TRITON_CEILINGS[op]
    elif "unaligned" not in name:
        assert_streams(report, TRITON_CEILINGS[op + " elementwise" * ("elementwise" in name)])


@pytest.fixture(scope="module")
def cuda_reports():
    if not isinstance(EXTENSION, dict) or not EXTENSION["cuda"]:
        pytest.skip("flatkern._C was built without CUDA")
    return sass.analyse_file(Path(flatkern._backend._C.__file__))


def cuda_form(report):
    """(op, elementwise) of an instance of perturb_kernel<Op, Src, Dst, Elementwise>."""
    op, *_, elementwise = report.kernel.partition("<")[2].rstrip(">").split(", ")
    return op.lower() + " elementwise" * (elementwise == "true")


def test_cuda_was_compiled_for_what_it_says(cuda_reports):
    if re.search("[A-Za-z]{2}", EXTENSION["cuda"]["archs"].replace("+PTX", "")):
        pytest.skip("an architecture by name")
    archs = EXTENSION["cuda"]["archs"].replace(";", " ").replace("+PTX", "").split()
    expected = {int(arch.replace(".", "").rstrip("af")) for arch in archs}
    assert {report.arch for report in cuda_reports} == expected


def test_cuda_elementwise(cuda_reports):
    vectors = [r for r in cuda_reports if r.kernel.startswith("perturb_kernel<")]
    archs = {report.arch for report in cuda_reports}
    # Nine pairs of dtypes perturb, three dtypes restore, both with and without elementwise.
    assert len(vectors) == 24 * len(archs)
    for report in vectors:
        form, older = cuda_form(report), report.arch < 100
        ceiling = (CUDA_CEILINGS if older else CUDA_CEILINGS_SM_100)[form]
        if form in ("perturb", "restore") and report.kernel.count("Float16, ") == 2:
            ceiling = IN_PLACE_16 if older else IN_PLACE_16_SM_100
        assert_streams(report, ceiling)
        # Two vectors of 16 bits or one of float32 are under way.
        assert report.loads["128"] == 2
        assert_no_spills(report)


def test_triton_keeps_up_with_cuda(triton_reports, cuda_reports):
    """Noise, and perturb and restore in place: at most a tenth more instructions an element."""
    dtypes = {"BFloat16": "bfloat16", "Float16": "float16", "float": "float32"}
    compared = 0
    for report in cuda_reports:
        own = re.fullmatch(r"perturb_kernel<(\w+), (\w+), (\w+), false>", report.kernel)
        if report.kernel == "noise_kernel<true>":
            name = "noise"
        elif own is not None and own[2] == own[3]:
            name = f"{own[1].lower()}_ {dtypes[own[2]]}"
        else:
            continue
        if (name, report.arch) in triton_reports:
            other = triton_reports[name, report.arch]
            assert other.per_element <= 1.1 * report.per_element, report
            compared += 1
    # Three of the seven everywhere.
    archs = {report.arch for report in cuda_reports}
    assert compared == 3 * len(archs) + 4 * (90 in archs)


def test_no_cuda_kernel_fuses_the_noise_with_a_sum(cuda_reports):
    """e = c z is rounded before it is added: -fmad=false, and no fmaf in the wrong place."""
    noisy = [report for report in cuda_reports if report.cosines]
    names = {report.kernel.partition("<")[0] for report in noisy}
    assert names >= {
        "perturb_kernel",
        "perturb_unaligned_kernel",
        "perturb_residual_kernel",
        "restore_residual_kernel",
    }
    assert {report.kernel: report.fused for report in noisy if report.fused} == {}


def test_no_triton_kernel_fuses_the_noise_with_a_sum(triton_reports):
    noisy = [report for report in triton_reports.values() if report.cosines]
    names = {report.kernel.split()[1] for report in noisy}
    assert names >= {"perturb_", "restore_", "perturb"}
    fused = {(report.kernel, report.arch) for report in noisy if report.fused}
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version < (3, 8):
        # Its compiler fuses pairs (FFMA2) on sm_100, fusion allowed or not: see docs/noise.md.
        fused = {(kernel, arch) for kernel, arch in fused if arch < 100}
    assert fused == set()


def test_cuda_noise(cuda_reports):
    found = [r for r in cuda_reports if r.kernel == "noise_kernel<true>"]
    assert found
    for report in found:
        assert_streams(report, CUDA_CEILINGS[report.kernel])
        assert_no_spills(report)


def test_cuda_uniform_values(cuda_reports):
    """Fewer instructions than normals, and stores as wide."""
    found = [r for r in cuda_reports if r.kernel == "uniform_kernel<true>"]
    assert found
    for report in found:
        assert_streams(report, CUDA_CEILINGS["noise_kernel<true>"])
        assert_no_spills(report)


def test_cuda_spills(cuda_reports):
    for report in cuda_reports:
        assert report.spill_bytes <= CUDA_STACK.get(report.kernel.partition("<")[0], 0), report


def test_cuda_row_norms(cuda_reports):
    found = [r for r in cuda_reports if r.kernel.startswith("row_norm_kernel<")]
    assert len(found) == 18 * len({report.arch for report in cuda_reports})
    for report in found:
        blocks, dtype, aligned = report.kernel.partition("<")[2].rstrip(">").split(", ")
        if aligned == "true":
            if dtype == "BFloat16" or report.arch < 100:
                assert_no_spills(report)
            assert set(report.loads) == {"128"}
            assert report.path <= ROW_NORM_CEILINGS[blocks, dtype], report
            assert (report.products > 0) == (blocks != "0")


def test_cuda_residuals_move_128_bits(cuda_reports):
    found = [r for r in cuda_reports if re.match(r"(perturb|restore)_residual_kernel<", r.kernel)]
    assert len(found) == 24 * len({report.arch for report in cuda_reports})
    for report in found:
        name, _, rest = report.kernel.rstrip(">").partition("<")
        dtype, elementwise, vector = rest.split(", ")
        if vector == "true":
            assert_no_spills(report)
            form = "32" if dtype == "float" else "16" + " elementwise" * (elementwise == "true")
            assert "128" in report.loads
            assert "128" in report.stores
            if form == "32" and elementwise == "true":
                # Kept raw: nothing goes into a stream.
                assert report.path < 45
            else:
                assert report.path <= RESIDUAL_CEILINGS[name][form]


@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        ("perturb_kernel<Perturb, float, BFloat16, false>", 2),
        ("perturb_kernel<Perturb, BFloat16, float, true>", 4),
        ("noise_kernel<true>", 4),
    ],
)
def test_the_last_dtype_of_a_name_is_what_is_stored(kernel, size):
    assert sass.stored_bytes(kernel) == size
