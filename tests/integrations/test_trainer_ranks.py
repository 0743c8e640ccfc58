"""transformers' Trainer under DDP; see trainer_ranks.py for what is held."""

import socket

import pytest

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import on_ranks
import trainer_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every check on two ranks, in one group of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    on_ranks.spawn(trainer_ranks.run_rank, trainer_ranks.WORLD, folder, port)
    return folder


@pytest.mark.parametrize("name", trainer_ranks.CHECKS)
def test_on_two_ranks(folder, name):
    for rank in range(trainer_ranks.WORLD):
        found = (folder / f"{name}-{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"
