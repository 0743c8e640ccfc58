"""Grouping an ordinary loader into the micro-batches of optimizer steps."""

import pytest
import torch

from flatkern.methods import micro_batches


@pytest.mark.parametrize(("count", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (9, [7])])
def test_groups_keep_the_order_and_lose_nothing(count, sizes):
    loader = torch.utils.data.DataLoader(torch.arange(14), batch_size=2)
    groups = list(micro_batches(loader, count))
    assert [len(group) for group in groups] == sizes
    assert torch.equal(torch.cat([batch for group in groups for batch in group]), torch.arange(14))
    assert list(micro_batches([], count)) == []


def test_a_loader_is_read_as_it_is_needed():
    read = []
    groups = micro_batches((read.append(i) or i for i in range(10)), 2)
    assert next(groups) == [0, 1]
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("loader", "count", "error"),
    [(3, 2, TypeError), ([], "2", TypeError), ([], True, TypeError), ([], 0, ValueError)],
)
def test_wrong_arguments(loader, count, error):
    with pytest.raises(error, match=r"micro_batches: (loader|count) must be"):
        micro_batches(loader, count)
