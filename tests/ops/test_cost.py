"""The choice between a product that makes its noise and one that reads it."""

import pytest
import torch

from flatkern.ops import _cost

BF16 = torch.bfloat16
H100 = (9, 0)
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 1024), (384, 384), (32, 4096), (7, 5)]
ORDER = [1, 16, 64, 200, 256, 257, 300, 512, 513, 700, 1024, 2048, 4096, 8192, 2**17]


@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_few_tokens_are_multiplied_with_their_noise(tokens):
    for dtype in (BF16, torch.float16):
        for transposed in (False, True):
            assert _cost.choose(tokens, 4096, 4096, dtype, H100, transposed=transposed) == "fused"


def test_many_tokens_share_noise_in_scratch():
    """At 2,048 tokens the noise of 8 blocks costs twice the product; 4096 x 4096 fits 32 MiB."""
    assert _cost.choose(2048, 4096, 4096, BF16, H100) == "scratch"
    assert _cost.choose(2048, 11008, 4096, BF16, H100) == "panels"


def test_scratch_bytes_bound_what_is_written():
    bound = 4096 * 4096 * 2
    for scratch_bytes, expected in ((bound, "scratch"), (bound - 1, "panels"), (None, "scratch")):
        got = _cost.choose(4096, 4096, 4096, BF16, H100, scratch_bytes=scratch_bytes)
        assert got == expected
    # 64 MiB in float32.
    assert _cost.choose(4096, 4096, 4096, torch.float32, H100) == "panels"


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, H100), (BF16, None)])
def test_without_16_bit_tensor_cores_nothing_is_fused(dtype, capability):
    assert {_cost.choose(t, 4096, 2048, dtype, capability) for t in ORDER} == {"scratch"}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_more_tokens_never_turn_the_choice_back(capability, transposed):
    for rows, cols in SHAPES:
        fused = [
            _cost.choose(t, rows, cols, BF16, capability, transposed=transposed) == "fused"
            for t in ORDER
        ]
        assert fused == sorted(fused, reverse=True), (rows, cols)
        assert not fused[ORDER.index(1024)], "four times the noise is never worth it"


def test_the_crossover_is_where_the_times_cross():
    """On a GPU whose noise costs exactly what the choice compares."""
    device = _cost.DEVICES[9]
    for rows, cols in SHAPES:
        for tokens in (256, 512, 1024):
            fused = _cost.fused_seconds(tokens, rows, cols, device)
            other = _cost.scratch_seconds(tokens, rows, cols, device)
            expected = fused * _cost.MARGIN < other
            assert (_cost.choose(tokens, rows, cols, BF16, H100) == "fused") == expected


def test_times_against_hand_calculation():
    """4096 x 4096 on an H100, in microseconds: 33.6 MB read at 90 % of 3.0 TB/s are 12.4."""
    device = _cost.DEVICES[9]
    size = 4096 * 4096

    def close(seconds, microseconds):
        assert seconds * 1e6 == pytest.approx(microseconds, abs=0.1)

    close(_cost.product_seconds(64, 4096, 4096, device), 12.43)
    close(_cost.product_seconds(2048, 4096, 4096, device), 2 * 2048 * size / 798e12 * 1e6)
    # 67.1 MB are read and written in 24.9; 19.5 instructions of 29.5e12 x 0.8 a second take 13.9.
    close(_cost.scratch_seconds(64, 4096, 4096, device), 6 + 24.86 + 12.43)
    # 25 instructions take 17.8, twice for two blocks.
    close(_cost.fused_seconds(64, 4096, 4096, device), 6 + 17.78 + 0.3 * 12.43)
    close(_cost.fused_seconds(257, 4096, 4096, device), 6 + 2 * 17.78 + 0.3 * 12.43)
    close(_cost.fused_seconds(64, 4096, 4096, device, True), 6 + 21.33 + 0.3 * 12.43)
