"""Windows and other processes: kill -9 and what comes after, forks, workers of data loaders."""

import multiprocessing
import os
import signal
import time

import pytest
import tolerances
import torch
import torch.multiprocessing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatkern
from flatkern.nn import load_adapter, replace_linear, save_adapter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
STEPS = 24
MODES = ("virtual", "inplace")


def in_new_process(function, *arguments):
    """In each mode, where no thread has run, autograd's among them: they do not survive a fork."""
    torch.multiprocessing.start_processes(
        in_each_mode, (function, *arguments), nprocs=1, start_method="spawn"
    )


def in_each_mode(_rank, function, *arguments):
    torch.set_num_threads(1)
    for mode in MODES:
        function(mode, *arguments)


def make(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(torch.bfloat16)
    replace_linear(model, "all-linear", r=2)
    return model, flatkern.WeightNoise(model, 0.3, mode=mode, seed=3)


@torch.no_grad()
def descend(model):
    """Plain SGD: torch's optimizers import its compiler, which takes longer than the tests."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight -= 0.02 * weight.grad
            weight.grad = None


def step(model, noise, x):
    with noise.window():
        loss = model(x).float().square().mean()
        loss.backward()
    descend(model)
    return loss.detach()


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 16, generator=generator).to(torch.bfloat16)


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected):
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, expected[name])


def train_and_save(mode, folder):
    model, noise = make(mode)
    for number in range(STEPS):
        step(model, noise, batch(number))
        save_adapter(model, folder)
    signal.pause()


def test_a_killed_run_goes_on_with_the_bits_of_one_that_was_not(tmp_path):
    """Whenever it is killed: in a window, between two steps, while the adapter is written."""
    in_new_process(kill_and_go_on, tmp_path)


def kill_and_go_on(mode, tmp_path):
    model, noise = make(mode)
    states, remembered = [], []
    for number in range(STEPS):
        step(model, noise, batch(number))
        states.append(copies(model))
        remembered.append(noise.state_dict())
    assert all(value.isfinite().all() for value in states[-1].values())

    for attempt in range(3):
        folder = tmp_path / f"{mode}-{attempt}"
        child = FORK.Process(target=train_and_save, args=(mode, folder))
        child.start()
        deadline = time.monotonic() + 60
        while not folder.is_dir() or not any(folder.glob("*.safetensors")):
            assert child.is_alive()
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.001)
        time.sleep(0.004 * attempt)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        model, noise = make(mode)
        load_adapter(model, folder)
        found = [n for n, state in enumerate(states) if same(model, state)]
        assert len(found) == 1, "the file is that of no step"
        noise.load_state_dict(remembered[found[0]])
        for number in range(found[0] + 1, STEPS):
            step(model, noise, batch(number))
        assert_state(model, states[-1])


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_both_sides_of_a_fork_close_their_window():
    in_new_process(fork_in_a_window)


def fork_in_a_window(mode):
    model, noise = make(mode)
    before = copies(model)
    expected = step(*make(mode), batch(0))
    noise.open()

    def child():
        noise.close()
        assert_state(model, before)
        assert not noise.active
        step(model, noise, batch(1))

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    loss = model(batch(0)).float().square().mean()
    tolerances.assert_same_bits(loss.detach(), expected)
    noise.close()
    assert_state(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_workers_of_a_data_loader_start_and_end_inside_a_window(mode, threads):
    """Forked while the weights are noisy, they end without touching them."""
    threads(1)
    data = TensorDataset(torch.stack([batch(number) for number in range(4)]))
    losses = []
    for workers in (0, 2):
        model, noise = make(mode)
        before = copies(model)
        loader = DataLoader(
            data, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        with noise.window():
            losses.append(torch.stack([model(x[0]).float().square().mean() for (x,) in loader]))
        assert_state(model, before)
    tolerances.assert_same_bits(*losses)
