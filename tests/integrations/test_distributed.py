"""Training on ranks equals training on one; distributed_*checks.py and ddp_checks.py say how.

All of it in one file, which starts the server of ranks and a group of each size once: the server
takes 15 s of CPU.
"""

import importlib.util
from pathlib import Path

import ddp_checks
import on_ranks
import pytest
import torch.distributed

from flatkern import methods

ROOT = Path(__file__).parents[2]
MODULES = ["distributed_checks", "distributed_fsdp_checks", "distributed_landscape_checks"]
MODULES += ["ddp_checks"]
if importlib.util.find_spec("peft") is not None:
    MODULES += ["distributed_peft_checks", "distributed_kinds_checks"]
    if importlib.util.find_spec("accelerate") is not None:
        MODULES += ["distributed_trainer_checks"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runner(folder):
    return on_ranks.Runner(folder, MODULES)


@pytest.mark.parametrize(("world", "name"), on_ranks.checks_of(MODULES))
def test_on_ranks(runner, world, name):
    runner.assert_passed(world, name)


def test_every_method_is_among_them():
    assert set(ddp_checks.KINDS) - {methods.Method} == {case.type for case in ddp_checks.EVERY}


@pytest.mark.parametrize("kind", ["distributed_checks", "distributed_peft_checks"])
def test_a_checkpoint_of_two_ranks_resumes_on_one(runner, folder, kind):
    checks = pytest.importorskip(kind)
    runner.run(2)
    found = checks.resumed(on_ranks.batch_of, folder)
    on_ranks.assert_trained_alike(found, checks.uninterrupted(), 1)


def test_the_example(tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    example = ROOT / "examples" / "fsdp2.py"
    on_ranks.spawn(on_ranks.run_example, 2, store.port, example, tmp_path)
    lines = (tmp_path / "output-0").read_text().splitlines()
    losses = [float(line.split()[3]) for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
