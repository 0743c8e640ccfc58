"""Sharded training equals unsharded training; distributed_*checks.py say what is held."""

import importlib
import importlib.util
from pathlib import Path

import on_ranks
import pytest
import torch
import torch.distributed
import torch.multiprocessing

ROOT = Path(__file__).parents[2]
WORLDS = (2, 4)
MODULES = ["distributed_checks", "distributed_fsdp_checks", "distributed_landscape_checks"]
# Ranks fork from a server that has imported these, which takes as long as the checks.
IMPORTED_ONCE = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
if importlib.util.find_spec("peft") is not None:
    MODULES.append("distributed_peft_checks")
    IMPORTED_ONCE += ["peft", "transformers.trainer", "transformers.models.llama.modeling_llama"]
for module in MODULES:
    importlib.import_module(module)


def spawn(function, world, *arguments):
    """Processes of (rank, world, *arguments), which see no GPU: their group is gloo's."""
    # Whoever asks for GPUs starts CUDA, which no fork survives; some of the imports do.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
        torch.multiprocessing.start_processes(
            function, (world, *arguments), nprocs=world, start_method=method
        )


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
        spawn(on_ranks.run_rank, world, folder, MODULES)

    return run_once


@pytest.mark.parametrize(
    ("world", "name"),
    [(w, name) for w in WORLDS for name, (ranks, _) in on_ranks.CHECKS.items() if w in ranks],
)
def test_on_ranks(run, folder, world, name):
    run(world)
    for rank in range(world):
        found = (folder / f"{name}-{world}-{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"


@pytest.mark.parametrize("kind", ["distributed_checks", "distributed_peft_checks"])
def test_a_checkpoint_of_two_ranks_resumes_on_one(run, folder, kind):
    checks = pytest.importorskip(kind)
    run(2)
    found = checks.resumed(on_ranks.batch_of, folder)
    on_ranks.assert_trained_alike(found, checks.uninterrupted(), 1)


def test_the_example(tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    spawn(on_ranks.run_example, 2, store.port, ROOT / "examples" / "fsdp2.py", tmp_path)
    lines = (tmp_path / "output-0").read_text().splitlines()
    losses = [float(line.split()[3]) for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
