"""Every method on several ranks; ddp_checks.py says what is held."""

import ddp_checks
import on_ranks
import pytest
import torch.multiprocessing

from flatkern import methods

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def run(folder):
    """Every check on a number of ranks, in one group of processes, at the first use."""
    done = set()

    def run_once(world):
        if world in done:
            return
        done.add(world)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            # Their group is gloo's.
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            torch.multiprocessing.start_processes(
                on_ranks.run_rank,
                (world, folder, ["ddp_checks"]),
                nprocs=world,
                start_method="spawn",
            )

    return run_once


@pytest.mark.parametrize(
    ("world", "name"),
    [(w, name) for w in WORLDS for name, (ranks, _) in ddp_checks.CHECKS.items() if w in ranks],
)
def test_on_ranks(run, folder, world, name):
    run(world)
    for rank in range(world):
        found = (folder / f"{name}-{world}-{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"


def test_every_method_is_among_them():
    assert set(ddp_checks.KINDS) - {methods.Method} == {case.type for case in ddp_checks.EVERY}
