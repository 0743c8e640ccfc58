"""transformers' Trainer under DDP; see trainer_ranks.py for what is held."""

import socket

import pytest
import torch.multiprocessing

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import trainer_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every check on two ranks, in one group of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.start_processes(
            trainer_ranks.run_rank,
            (folder, port),
            nprocs=trainer_ranks.WORLD,
            start_method="spawn",
        )
    return folder


@pytest.mark.parametrize("name", trainer_ranks.CHECKS)
def test_on_two_ranks(folder, name):
    for rank in range(trainer_ranks.WORLD):
        found = (folder / f"{name}-{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"
