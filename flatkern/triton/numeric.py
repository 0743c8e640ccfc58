"""One element: dtype to float32 and back, rounding to nearest even, what stays finite.

The device functions of csrc/numeric.h over tiles. Half-width dtypes go through packed
instructions; the interpreter, which has none and mistreats bfloat16, takes another way to the
same bits.
"""

import triton
import triton.language as tl

from flatkern.triton import _launch

INTERPRETED = tl.constexpr(_launch.INTERPRETED)


@triton.jit
def widen(x):
    """float32 of a tile, exactly."""
    if x.dtype == tl.bfloat16:
        if INTERPRETED:
            # The interpreter's own cast mistreats denormals.
            bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            return bits.to(tl.float32, bitcast=True)
        else:
            # Two instructions per pair; taken apart by the compiler it is three.
            return tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=f,=f,r",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(y, dtype: tl.constexpr):
    """To nearest even, in the interpreter too, which truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        bits = tl.where(y == y, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)


@triton.jit
def _overflow(dtype: tl.constexpr):
    """The first magnitude that rounds to infinity."""
    if dtype == tl.bfloat16:
        return 3.3961775292304957e38  # 0x1.FFp127
    elif dtype == tl.float16:
        return 65520.0
    else:
        return float("inf")


# On a pair of halves: round, then -1 where y is finite and NaN elsewhere from y * 0 - 1, whose sign
# bits, spread over their halves, select y or what was there before.
_KEEP_FINITE = """{
    .reg .b32 y, keep, zero, minus_one;
    mov.b32 zero, 0;
    mov.b32 minus_one, MINUS_ONE;
    cvt.rn.TYPE.f32 y, $2, $1;
    fma.rn.TYPE keep, y, zero, minus_one;
    prmt.b32 keep, keep, 0, 0xbb99;
    lop3.b32 $0, keep, y, $3, 0xca;
    }"""
KEEP_FINITE_BF16 = tl.constexpr(
    _KEEP_FINITE.replace("TYPE", "bf16x2").replace("MINUS_ONE", "0xbf80bf80")
)
KEEP_FINITE_F16 = tl.constexpr(
    _KEEP_FINITE.replace("TYPE", "f16x2").replace("MINUS_ONE", "0xbc00bc00")
)


@triton.jit
def keep_finite(y, before, wide, dtype: tl.constexpr):
    """y rounded to `dtype`; where it is not finite, `before` (in float32: `wide`) as it was."""
    if before.dtype == tl.bfloat16 and dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            KEEP_FINITE_BF16, "=r,f,f,r", [y, before], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif before.dtype == tl.float16 and dtype == tl.float16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            KEEP_FINITE_F16, "=r,f,f,r", [y, before], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        finite = tl.abs(y) < _overflow(dtype)
        if before.dtype == dtype:
            return tl.where(finite, round_to(y, dtype), before)
        else:
            return round_to(tl.where(finite, y, wide), dtype)
