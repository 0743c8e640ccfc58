"""A sample of `python -m bench.reliability.faults`, and what it found, one by one.

The command strikes 10,000 times; docs/reliability.md has its figures.
"""

import pickle
import random
import threading
import warnings

import pytest
import tolerances
import torch
from torch import nn

import flatkern
from bench.reliability import faults
from bench.reliability.injectors import PACKAGE, Lines
from flatkern import ops
from flatkern.nn import replace_linear
from flatkern.noise import registry

SAMPLE = [
    faults.Case(torch.bfloat16, "virtual", "residual", "all", "paused"),
    faults.Case(torch.bfloat16, "inplace", "residual", "full", "window"),
    faults.Case(torch.float32, "inplace", "snapshot", "trainable", "open"),
    faults.Case(torch.float16, "inplace", "host", "merged", "saved"),
    faults.Case(torch.float64, "inplace", "residual", "merged", "batches"),
    faults.Case(torch.bfloat16, "inplace", work="two windows"),
    faults.Case(torch.float32, "virtual", layers="peft"),
    faults.Case(torch.float32, method="SAM"),
    faults.Case(torch.bfloat16, method="ARWP"),
    faults.Case(torch.float32, method="MixedRWP"),
    faults.Case(torch.bfloat16, scope="all", work="batches", layers="quantised"),
    faults.Case(torch.float32, "inplace", work="trainer", layers="peft"),
    faults.Case(torch.float32, "inplace", work="lightning"),
]
NEEDS = {"peft": ["peft"], "quantised": ["peft", "bitsandbytes"], "trainer": ["accelerate"]}
NEEDS["lightning"] = ["lightning"]


@pytest.fixture(autouse=True)
def quiet(threads):
    threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: "-".join(map(str, case)))
def test_nothing_is_lost(case):
    for package in NEEDS.get(case.layers, []) + NEEDS.get(case.work, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    harness, chance, raised = faults.Harness(), random.Random(5), 0
    # A Trainer's step takes a second with its fault.
    kinds = ("line",) if case.work in faults.TRAINERS else ("line", "op", "behind an op")
    for kind in kinds:
        for error in faults.ERRORS:
            at = chance.randint(1, harness.points(case, kind))
            outcome, finding = harness.strike(case, kind, at, error)
            assert finding is None, finding
            raised += outcome == "raised"
    # A step may have fewer points than the one in which they were counted.
    assert raised > 3 * len(kinds)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    replace_linear(model, "all-linear", r=2, init_lora_weights=False)
    return model


def test_an_error_in_close_leaves_no_hook(monkeypatch):
    model = make()
    noise = flatkern.WeightNoise(model)
    noise.open()
    monkeypatch.setattr(noise._weights, "hide", lambda: 1 / 0)
    noise.close()
    assert not model._forward_pre_hooks


def strike_every(run, injector_of, check, stride=1):
    """Run with a fault at each point in turn, or each of a stride, until one comes too late."""
    for at in range(1, 3000, stride):
        injector = injector_of(at)
        try:
            with injector:
                run()
        except (KeyboardInterrupt, MemoryError):
            check()
            continue
        check()
        assert at > 3
        return
    raise AssertionError("the runs do not end")


def test_a_backend_is_left_whatever_interrupts_it():
    def run():
        with flatkern.backend("reference"):
            pass

    def check():
        assert flatkern.build_info()["backend"] == "auto"

    strike_every(run, lambda at: Lines(at, KeyboardInterrupt), check)


class InStates(Lines):
    within = f"{PACKAGE}/noise/state.py"


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_a_first_window_by_hand_interrupted(mode):
    """What is left open can be closed; the next window has the right noise, as have others'."""
    model, x = make(), torch.ones(2, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def new():
        return flatkern.WeightNoise(model, 0.3, mode=mode, seed=7)

    def output(noise):
        with noise.window(step=0):
            return model(x).detach()

    noise, other, expected = new(), new(), output(new())

    def run():
        noise.open(step=0)
        noise.close()

    def check():
        nonlocal noise
        if noise.active:
            noise.close()
        for each in (noise, other):
            tolerances.assert_same_bits(output(each), expected)
        assert not registry._OPEN
        for name, value in model.state_dict().items():
            tolerances.assert_same_bits(value, before[name])
        assert not any(module._forward_pre_hooks for module in model.modules())
        noise = new()

    strike_every(run, lambda at: InStates(at, KeyboardInterrupt), check)


class InIntegrations(Lines):
    within = f"{PACKAGE}/integrations"


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_a_callback_interrupted_at_any_line_takes_everything_off(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from flatkern.integrations._run import NoisyRun
    from flatkern.integrations.peft import attach, detach, is_attached

    parts = {"linear": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    model = nn.ModuleDict({"q": parts[kind]})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"]), model)
    run = NoisyRun(0.3)

    def marks():
        hooks = [hook for m in model.modules() for hook in (m._forward_pre_hooks, m._forward_hooks)]
        return [set(vars(module)) for module in model.modules()], list(map(len, hooks))

    before = marks()

    def train():
        try:
            run._begin(model, 10)
            run.finish()
        finally:
            run.finish()  # as the callback does around `train`

    def check():
        assert not is_attached(model)
        assert marks() == before
        attach(model)
        detach(model)

    # Each line takes 20 s.
    strike_every(train, lambda at: InIntegrations(at, KeyboardInterrupt), check, stride=11)


class InTheReference(Lines):
    within = f"{PACKAGE}/reference/perturb.py"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_the_references_residual_goes_on_after_an_interruption(dtype):
    """Between the write of the weight and that of the residual, too."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean, scale = weight.clone(), torch.full((3,), 0.3)
    key = flatkern.NoiseKey(1).to("cpu")
    residual = ops.new_residual(weight)

    def run():
        ops.perturb_(weight, scale, key, residual=residual)
        ops.restore_(weight, scale, key, residual=residual)

    def check():
        if ops.residual.is_filled(residual):
            ops.restore_(weight, scale, key, residual=residual)
        tolerances.assert_same_bits(weight, clean)

    with flatkern.backend("reference"):
        strike_every(run, lambda at: InTheReference(at, KeyboardInterrupt), check)


def test_threads_have_windows_of_their_own_models():
    """Two at once give what one after the other does, and leave clean weights."""
    results, errors = {}, []

    def work(number, mode, model):
        try:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            noise = flatkern.WeightNoise(model, 0.5, mode=mode, seed=number)
            x, grads = torch.ones(2, 8), []
            for _ in range(20):
                model.zero_grad()
                with noise.window():
                    model(x).sum().backward()
                grads.append(model[0].lora_B.grad.clone())
            for name, value in model.state_dict().items():
                tolerances.assert_same_bits(value, before[name])
            results.setdefault((number, mode), []).append(torch.stack(grads))
        except BaseException as error:
            errors.append(error)

    jobs = [(0, "virtual"), (1, "inplace")]
    # Made here: the start of a model moves torch's generator, which threads share.
    running = [threading.Thread(target=work, args=(*job, make())) for job in jobs]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for job in jobs:
        work(*job, make())
    assert not errors, errors
    for pair in results.values():
        tolerances.assert_same_bits(*pair)


ACTIONS = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "tie": lambda model: setattr(model[1], "weight", model[0].weight),
    "freeze": lambda model: model.requires_grad_(False),
    "merge": lambda model: model[0].merge(),
    "eval": lambda model: model.eval(),
    "replace": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(8, 8), False)),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("restore", ["residual", "snapshot", "host"])
@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_what_is_done_to_a_model_in_an_open_window(mode, restore, action):
    """It works, and the weights are the clean ones or their cast; or it is refused by name."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = flatkern.WeightNoise(model, 0.5, mode=mode, restore=restore)
    refused = None
    noise.open()
    try:
        ACTIONS[action](model)
    except (RuntimeError, TypeError, ValueError) as error:
        refused = str(error)
    closing = None
    try:
        noise.close()
    except RuntimeError as error:
        closing = str(error)
        noise.discard()
    if closing is not None:
        assert action in ("tie", "replace"), closing
        assert "0.weight" in closing or "1.weight" in closing
    if refused is not None:
        assert "window" in refused or "WeightNoise" in refused, refused
    assert not noise.active
    for name, value in model.state_dict().items():
        if action in ("tie", "replace") and name.endswith("weight"):
            continue
        expected = before[name].to(value.dtype)
        if action == "merge" and refused is None:
            model[0].unmerge()
        tolerances.assert_same_bits(value, expected)
