"""Whatever ends a window, and wherever, the weights come back bit for bit."""

import contextlib
import sys

import pytest
import tolerances
import torch
from noisy_models import clean_weights, data, lora_layers, loss_of, make_model, seen_weight

import flatkern
from flatkern.noise import guards, keep, targets, weights, window

both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])
BACKEND = flatkern.build_info()["backend"]
ERRORS = [RuntimeError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit]


def assert_over(noise, model, before):
    """No window is open, every bit is clean, nothing hangs on the modules; a next window works."""
    assert not noise.active
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert flatkern.build_info()["backend"] == BACKEND
    for layer in lora_layers(model):
        assert layer._window is None
    for module in model.modules():
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert "_apply" not in vars(module)
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])
    with noise.window(step=0):
        assert not torch.equal(seen_weight(model[1]), before["1.weight"])
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, before[name])


@pytest.fixture
def model():
    return make_model(torch.bfloat16)


@both_modes
@pytest.mark.parametrize("error", ERRORS)
def test_exception_in_the_body(model, mode, error):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    with pytest.raises(error), noise.window():
        raise error
    assert noise.step == 0
    assert_over(noise, model, before)


@both_modes
def test_exception_in_backward(model, mode):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)

    def fail(grad):
        raise ZeroDivisionError

    def run():
        y = model(data(torch.bfloat16))
        y.register_hook(fail)
        y.sum().backward()

    with pytest.raises(ZeroDivisionError), noise.window():
        run()
    assert_over(noise, model, before)


@both_modes
def test_leaving_a_loop_or_a_function(model, mode):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)

    def early():
        with noise.window():
            return loss_of(model, data(torch.bfloat16)).item()

    early()
    for _ in range(3):
        with noise.window():
            break
    assert noise.step == 2
    assert_over(noise, model, before)


def fail_at(monkeypatch, op, failing, error, half_written=False):
    """`op` does what comes before the weight number `failing` of its lists, then raises."""
    original = getattr(flatkern.ops, op)

    def fail(*lists, **options):
        def cut(values):
            return values[: failing - 1] if isinstance(values, list) else values

        original(*map(cut, lists), **{name: cut(values) for name, values in options.items()})
        if half_written:
            lists[0][failing - 1][0].fill_(7)
        raise error

    monkeypatch.setattr(flatkern.ops, op, fail)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize(
    ("op", "restore", "half_written"),
    [
        ("foreach_row_norm", "snapshot", False),
        ("foreach_perturb_", "snapshot", False),
        ("foreach_perturb_", "snapshot", True),
        ("foreach_perturb_", "residual", False),
    ],
)
def test_error_in_the_kth_layer(monkeypatch, model, error, failing, op, restore, half_written):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace", restore=restore)
    fail_at(monkeypatch, op, failing, error, half_written)
    for enter in (noise.open, noise.window().__enter__):
        with pytest.raises(error):
            enter()
        assert noise.step == 0
        assert not noise.active
    monkeypatch.undo()
    assert_over(noise, model, before)


def test_out_of_memory_for_a_snapshot(monkeypatch, model):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace", restore="snapshot")
    empty_like, calls = torch.empty_like, []

    def fail(tensor, **options):
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", fail)
    with pytest.raises(torch.OutOfMemoryError):
        noise.open()
    monkeypatch.undo()
    assert_over(noise, model, before)


def test_snapshots_are_allocated_once(monkeypatch, model):
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace", restore="snapshot")
    empty_like, calls = torch.empty_like, []

    def counted(tensor, **options):
        calls.append(tensor)
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", counted)
    for _ in range(3):
        with noise.window(), noise.paused():
            pass
    assert len(calls) == 3


def test_a_layer_that_cannot_be_restored_does_not_keep_the_others(monkeypatch, model):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace")
    noise.open()
    restore = flatkern.ops.foreach_restore_

    def fail(weights, *lists, **options):
        if any(weight.data_ptr() == model[3].weight.data_ptr() for weight in weights):
            raise RuntimeError("no device")
        restore(weights, *lists, **options)

    monkeypatch.setattr(flatkern.ops, "foreach_restore_", fail)
    with pytest.raises(RuntimeError, match="no device"):
        noise.close()
    tolerances.assert_same_bits(model[1].weight, before["1.weight"])
    tolerances.assert_same_bits(model[4].weight, before["4.weight"])
    # Still open: the snapshot of the third must not be overwritten by a next window.
    assert noise.active
    with pytest.raises(RuntimeError, match="while a window is open"):
        noise.open()
    monkeypatch.undo()
    noise.close()
    assert noise.step == 1
    assert_over(noise, model, before)


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("restore", ["snapshot", "residual", "host"])
def test_error_when_a_pause_ends(monkeypatch, model, failing, restore):
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace", restore=restore)
    noise.open()
    fail_at(monkeypatch, "foreach_perturb_", failing, MemoryError)
    with pytest.raises(MemoryError), noise.paused():
        pass
    monkeypatch.undo()
    assert_over(noise, model, before)


class Interrupt:
    """Raises KeyboardInterrupt before the nth line that is run in the window's own files."""

    FILES = tuple(part.__file__ for part in (window, weights, targets, guards, keep))

    def __init__(self, at, more_files=()):
        self.left = at
        self.files = {*self.FILES, *more_files}

    def __enter__(self):
        self.previous = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(self.previous)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


def every_interrupt(run, step=1, more_files=()):
    """Call `run(interrupt)` with an interrupt at each line in turn, until one comes too late."""
    for at in range(1, 4000, step):
        interrupt = Interrupt(at, more_files)
        try:
            run(interrupt)
        except KeyboardInterrupt:
            continue
        assert interrupt.left > 0
        assert at > 30
        return
    raise AssertionError("the runs do not end")


@both_modes
@pytest.mark.parametrize("failing", [False, True])
def test_ctrl_c_at_any_line(mode, failing):
    model = make_model(torch.bfloat16, targets=("1", "4"))
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)

    def body():
        with noise.paused():
            pass
        if failing:
            raise ZeroDivisionError

    def run(interrupt):
        try:
            with contextlib.suppress(ZeroDivisionError), interrupt, noise.window():
                body()
        finally:
            sys.settrace(interrupt.previous)
            assert_over(noise, model, before)

    every_interrupt(run)


@both_modes
def test_ctrl_c_in_close(mode):
    model = make_model(torch.bfloat16, targets=("1", "4"))
    before = clean_weights(model)
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    unfinished = 0

    def run(interrupt):
        nonlocal unfinished
        noise.open(step=0)
        try:
            with interrupt:
                noise.close()
        finally:
            sys.settrace(interrupt.previous)
            # Only before close's first statement is there nothing that could finish it.
            unfinished += noise.active
            noise.close()
            assert_over(noise, model, before)

    every_interrupt(run)
    assert unfinished <= 3


@pytest.mark.parametrize("grows", [False, True])
def test_ctrl_c_while_a_residual_is_filled_or_emptied(grows):
    """Also inside the ops; a pool that is too small is filled, emptied and filled once more."""
    model = make_model(torch.bfloat16, targets=("1", "4"))
    before = clean_weights(model)
    names = ("_residual", "residual", "perturb", "foreach")
    files = [sys.modules[f"flatkern.ops.{name}"].__file__ for name in names]

    def run(interrupt):
        noise = flatkern.WeightNoise(
            model, 0.001, mode="inplace", restore="residual", schedule=lambda step: 1 + 1000 * step
        )
        if grows:
            with noise.window():
                pass
        try:
            with interrupt, noise.window(step=1):
                pass
        finally:
            sys.settrace(interrupt.previous)
            for name, value in model.state_dict().items():
                tolerances.assert_same_bits(value, before[name])
            assert not noise.active

    # Every other line, for time.
    every_interrupt(run, step=2, more_files=files)
