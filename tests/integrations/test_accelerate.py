"""The loop that docs/accelerate.md shows, under the real accelerate."""

import contextlib

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from every_method import EVERY
from torch import nn

import flatkern
from flatkern import methods
from flatkern.nn import replace_linear

SIGMA = 0.3
ACCUMULATION = 3
SIZES = (3, 3, 2)  # Of the groups that 8 micro-batches make.
EPOCHS = 2
pytestmark = pytest.mark.usefixtures("own_accelerate")
MODES = ("virtual", "inplace")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    replace_linear(model, "all-linear", r=2, lora_alpha=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def parts(mode="virtual", sigma=SIGMA):
    model = network()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = flatkern.cosine_ramp(EPOCHS * len(SIZES))
    noise = flatkern.WeightNoise(model, sigma, mode=mode, schedule=schedule, seed=5)
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    return model, optimizer, noise, torch.utils.data.DataLoader(data, batch_size=2)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def loss_of(model, x):
    return (model(x) - x).square().mean()


def train(folder, mode="virtual", scaler=None, meddle=lambda *args: None, resume=False):
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    accelerator.scaler = scaler
    model, optimizer, noise, loader = parts(mode)
    clean = state(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(noise)
    if resume:
        accelerator.load_state(folder / "after-0")
    seen = []
    try:
        with contextlib.closing(noise):
            for epoch in range(int(resume), EPOCHS):
                for x in loader:
                    with accelerator.accumulate(model):
                        if not noise.active:
                            noise.open()
                        seen.append((noise.step, noise.active))
                        accelerator.backward(loss_of(model, x))
                        if accelerator.sync_gradients:
                            noise.close()
                        meddle(accelerator, model, noise, len(seen))
                        optimizer.step()
                        optimizer.zero_grad()
                accelerator.save_state(folder / f"after-{epoch}")
    finally:
        after = state(model)
        frozen = [name for name in clean if "lora_" not in name]
        assert all(torch.equal(after[name], clean[name]) for name in frozen)
        assert not noise.active
    return after, noise, seen


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_plain_loop(tmp_path, mode):
    after, noise, seen = train(tmp_path, mode)
    groups = [step for step, size in enumerate(SIZES * EPOCHS) for _ in range(size)]
    assert seen == [(step, True) for step in groups]
    assert noise.step == len(SIZES) * EPOCHS
    model, optimizer, noise, loader = parts()
    for _ in range(EPOCHS):
        batches = iter(loader)
        for size in SIZES:
            with noise.window():
                for _ in range(size):
                    (loss_of(model, next(batches)) / ACCUMULATION).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_bits(after, state(model))


@pytest.mark.parametrize("mode", MODES)
def test_resume_gives_the_same_bits(tmp_path, mode):
    whole, _, _ = train(tmp_path, mode)
    resumed, noise, seen = train(tmp_path, mode, resume=True)
    assert len(seen) == 8
    assert noise.step == len(SIZES) * EPOCHS
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_weights_as_they_were(tmp_path, mode, kind):
    def meddle(accelerator, model, noise, count):
        if count == 4:
            assert noise.active
            raise kind

    with pytest.raises(kind):
        train(tmp_path, mode, meddle=meddle)


def test_a_step_that_the_scaler_skips_is_one_window(tmp_path):
    def meddle(accelerator, model, noise, count):
        if count == 6:
            assert accelerator.sync_gradients
            model[0].lora_A.grad.fill_(torch.inf)

    # accelerate makes one only where there is a GPU.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    _, noise, seen = train(tmp_path, "inplace", scaler, meddle)
    assert scaler.get_scale() == 2.0
    assert noise.step == len(SIZES) * EPOCHS
    assert seen[6] == (2, True)


def train_by_method(name, prepare, scaler=None):
    """Two epochs of a method over groups of micro-batches."""
    model, optimizer, _, loader = parts()
    accelerator = Accelerator(cpu=True) if prepare else None
    if prepare:
        accelerator.scaler = scaler
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        optimizer = optimizer.optimizer
    method = EVERY[name](model, optimizer, scaler=scaler)
    for _ in range(EPOCHS):
        for batches in methods.micro_batches(loader, ACCUMULATION):
            method.step(lambda x: loss_of(model, x), batches)
    return state(model)


@pytest.mark.parametrize("name", EVERY)
def test_a_method_takes_what_accelerate_prepared(name):
    alone = train_by_method(name, False)
    assert same_bits(train_by_method(name, True), alone)
    # Scaled by a power of two, which commutes with all roundings here.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert same_bits(train_by_method(name, True, scaler), alone)


def test_every_method_is_among_them():
    known = [getattr(methods, name) for name in methods.__all__]
    found = {each.func for each in EVERY.values()}
    assert found == {each for each in known if isinstance(each, type)} - {methods.Method}
