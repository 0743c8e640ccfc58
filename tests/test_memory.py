import pytest
import torch

from flatkern._memory import peak_bytes

MIB = 2**20


def test_a_temporary_is_seen_although_nothing_of_it_stays() -> None:
    def work() -> None:
        torch.empty(MIB, dtype=torch.uint8)

    assert peak_bytes(work, "cpu") == MIB


def test_temporaries_one_after_the_other_count_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.empty(MIB, dtype=torch.uint8)

    assert peak_bytes(work, "cpu") == MIB


def test_what_is_held_together_adds_up() -> None:
    def work() -> None:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first, second
        torch.empty(MIB, dtype=torch.uint8)

    assert peak_bytes(work, "cpu") == 3 * MIB


def test_a_temporary_inside_an_operator_is_seen() -> None:
    values = torch.randn(MIB // 4)
    # sort returns values and int64 positions, 3 MiB for 1 MiB of input, and works in a buffer.
    assert peak_bytes(values.sort, "cpu") > 3 * MIB


def test_what_was_allocated_before_does_not_count() -> None:
    held = torch.zeros(4 * MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: held.add_(1), "cpu") < 1024


def test_backward_is_seen() -> None:
    weight = torch.randn(256, 256, requires_grad=True)
    # Product, relu and the two gradients on the way back are 256 KiB each.
    assert peak_bytes(lambda: (weight @ weight).relu().sum().backward(), "cpu") >= 3 * 256 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda() -> None:
    def work() -> None:
        torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")

    assert 8 * MIB <= peak_bytes(work, "cuda") < 9 * MIB


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        peak_bytes(lambda: None, "meta")
