"""What bench.sass reads out of a kernel: its hot part, its ways, and where products are fused."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("an installed copy has no bench", allow_module_level=True)
pytest.importorskip("tabulate")

from bench import sass, sass_flow  # noqa: E402

SASS = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
        /*0090*/                   NOP;
\t.section\t.nv.constant0,"a"
        /*0000*/                   FADD R4, R4, R5 ;
"""


def test_the_hot_part_is_the_innermost_loop_with_most_wide_stores():
    wide = "STG.E.128 desc[UR4][R2.64], R4"
    inner = [".L_x_1:", wide, wide, "@BRA `(.L_x_1)"]
    rest = [".L_x_2:", wide, "@BRA `(.L_x_2)"]
    hot, is_loop = sass.hot_part(lines_of(".L_x_0:", *inner, *rest, "@BRA `(.L_x_0)", "EXIT"))
    assert is_loop
    assert [line.text for line in hot if line.text] == [wide, wide, "BRA `(.L_x_1)"]


def test_the_hot_part_of_what_is_disassembled():
    (lines,) = sass.parse(SASS).values()
    assert sass.count(lines) == 9
    hot, is_loop = sass.hot_part(lines)
    assert is_loop
    assert sass.count(hot) == 4
    assert sass.wide_bytes(hot) == 16
    assert sass.widths(lines, "STG") == {"128": 1, "32": 1}
    assert sass.widths(hot, "LDG") == {"128": 1}


def test_without_a_loop_the_whole_kernel_counts():
    (lines,) = sass.parse(SASS.replace("@P0 BRA `(.L_x_0)", "@P0 BRA `(.L_x_1)")).values()
    hot, is_loop = sass.hot_part(lines)
    assert not is_loop
    assert hot == lines


def lines_of(*texts):
    """SASS of one function: labels end in a colon, @ begins what a predicate guards."""
    return [
        sass.Line(text[:-1], "")
        if text.endswith(":")
        else sass.Line(None, text.removeprefix("@"), text.startswith("@"))
        for text in texts
    ]


def texts_of(lines):
    return [line.text for line in lines if line.label is None]


BRANCHES = lines_of(
    "MUFU.COS R1, R2",
    "@BRA `(.L_rare)",
    ".L_back:",
    "@BRA `(.L_none)",
    "ATOMS.OR RZ, [R1], R2",
    ".L_none:",
    "STG.E.128 desc[UR4][R2.64], R4",
    "@EXIT",
    "STG.E desc[UR4][R2.64], R4",
    "EXIT",
    ".L_rare:",
    "LDG.E R1, desc[UR4][R2.64]",
    "BRA `(.L_back)",
)


def test_a_path_does_its_work_and_takes_no_detour():
    assert texts_of(sass.hot_path(BRANCHES)) == [
        "MUFU.COS R1, R2",
        "BRA `(.L_rare)",
        "BRA `(.L_none)",
        "ATOMS.OR RZ, [R1], R2",
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
    ]


def test_a_path_of_a_kernel_without_a_stream_is_the_shortest():
    left = [line for line in BRANCHES if not line.text.startswith("ATOMS")]
    assert sass.count(sass.hot_path(left)) == 5
    # More noise is worth more instructions.
    noisy = [*left[:-1], *lines_of("MUFU.SIN R1, R2", "FADD R1, R1, R2"), left[-1]]
    assert sass.count(sass.hot_path(noisy)) == 9


def test_a_loop_is_gone_through_once():
    lines = lines_of(
        "MOV R1, R2",
        ".L_loop:",
        "MUFU.COS R1, R2",
        "@BRA `(.L_loop)",
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
        ".L_end:",
        "BRA `(.L_end)",
    )
    assert sass.count(sass.hot_path(lines)) == 5


FUSED = {
    "product": ["MUFU.COS R7, R5", "FFMA R8, R6, R7, R9"],
    "one of two lanes": ["MUFU.SIN R7, R5", "FFMA2 R8, R6.F32x2.HI_LO, R4, R10"],
    "halves": ["MUFU.COS R7, R5", "FMUL R8, R6, R7", "HFMA2.BF16_V2 R8, R8, R2, R9"],
    "later product": ["MUFU.COS R7, R5", "FMUL R8, R6, R7", "FFMA R9, R8, |R3|, R3"],
    "beyond a branch": [
        "MUFU.COS R7, R5",
        "@BRA `(.L_add)",
        "MOV R7, RZ",
        ".L_add:",
        "FFMA R8, R6, R7, R9",
    ],
    "around a loop": [
        ".L_loop:",
        "FFMA R8, R6, R7, R9",
        "MUFU.COS R7, R5",
        "@BRA `(.L_loop)",
    ],
    "past a store": ["MUFU.COS R7, R5", "STG.E.128 desc[UR4][R6.64], R8", "FFMA R8, R6, R7, R9"],
    "kept by a guard": ["MUFU.COS R7, R5", "@MOV R7, RZ", "FFMA R8, R6, R7, R9"],
}
ROUNDED = {
    "sum": ["MUFU.COS R7, R5", "FMUL R8, R6, R7", "FADD R9, R8, R3"],
    "of the uniform": ["FFMA R3, R6, R31, 1.16e-10", "MUFU.LG2 R4, R3", "MUFU.COS R7, R5"],
    "what a sum gave": ["MUFU.COS R7, R5", "FADD R7, R7, R3", "FFMA R8, R6, R7, R9"],
    "as an addend": ["MUFU.COS R7, R5", "FFMA R8, R6, R5, R7"],
    "written over": ["MUFU.COS R7, R5", "MOV R7, R2", "FFMA R8, R6, R7, R9"],
    "times zero": ["MUFU.COS R7, R5", "FMUL R8, R6, R7", "FFMA R9, R8, RZ, R9"],
    "loaded over": ["MUFU.COS R7, R5", "LDG.E.128 R4, desc[UR4][R2.64]", "FFMA R8, R6, R7, R9"],
    "not on the way": [
        "@BRA `(.L_add)",
        "MUFU.COS R7, R5",
        "EXIT",
        ".L_add:",
        "FFMA R8, R6, R7, R9",
    ],
}


@pytest.mark.parametrize("name", [*FUSED, *ROUNDED])
def test_products_of_noise_that_are_fused(name):
    lines = lines_of(*{**FUSED, **ROUNDED}[name], "EXIT")
    assert len(sass_flow.fused_products(lines)) == (name in FUSED)
