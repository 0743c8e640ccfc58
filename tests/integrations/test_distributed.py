"""Sharded training equals unsharded training; see distributed_checks.py for what is held."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_checks
import pytest
import torch
import torch.multiprocessing

ROOT = Path(__file__).parents[2]
WORLDS = (2, 4)
# The ranks are forks of a process that has these: importing them takes longer than the checks.
IMPORTED_ONCE = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


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
        names = [name for name, (ranks, _) in distributed_checks.CHECKS.items() if world in ranks]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            torch.multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
            torch.multiprocessing.start_processes(
                distributed_checks.run_rank,
                (world, folder, names),
                nprocs=world,
                start_method="forkserver",
            )

    return run_once


@pytest.mark.parametrize("name", distributed_checks.CHECKS)
@pytest.mark.parametrize("world", WORLDS)
def test_on_ranks(run, folder, world, name):
    if world not in distributed_checks.CHECKS[name][0]:
        pytest.skip(f"not for {world} ranks")
    run(world)
    for rank in range(world):
        found = (folder / f"{name}-{world}-{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"


def test_a_checkpoint_of_two_ranks_resumes_on_one(run, folder):
    run(2)
    model = distributed_checks.make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = distributed_checks.resumed_losses(model, distributed_checks.batch_of, folder)
    distributed_checks.assert_trained_alike(found, distributed_checks.uninterrupted(), 1)


def test_the_example(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*command, ROOT / "examples" / "fsdp2.py", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(line.split()[3]) for line in run.stdout.splitlines() if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
