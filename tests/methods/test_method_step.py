"""What every method's step promises: the mean gradient, one update, nothing left behind."""

import copy

import pytest
import tolerances
import torch
from method_cases import (
    PAIRED,
    assert_left_clean,
    assert_parameters,
    cases,
    copies,
    every_case,
    frozen,
    loss_fn_of,
    make_batches,
    make_model,
    sgd,
    trainable,
)
from torch import nn

from flatkern.methods import BAR, EntropySGD, LoRA, NoisyTune
from flatkern.nn import BDALinear, DoRALinear, NoRALinear


def test_lora_is_the_usual_loop():
    ours, theirs = make_model(), make_model()
    optimizers = [torch.optim.AdamW(trainable(model), lr=1e-2) for model in (ours, theirs)]
    method = LoRA(ours, optimizers[0])
    for batches in (make_batches(3), make_batches(1), make_batches(2)):
        got = method.step(loss_fn_of(ours), batches)
        losses = [loss_fn_of(theirs)(batch) for batch in batches]
        for loss in losses:
            (loss / len(batches)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert isinstance(got, float)
        assert got == pytest.approx(sum(loss.item() for loss in losses) / len(losses), rel=1e-6)
        for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            tolerances.assert_same_bits(mine, expected)


@cases(lambda case: case.splits)
def test_micro_batches_are_one_batch(case):
    results = []
    for split in (False, True):
        model = make_model(torch.float64)
        method = case(model, sgd(model, lr=0.01))
        batches = make_batches(4, torch.float64)
        for _ in range(3):
            method.step(loss_fn_of(model), batches if split else [torch.cat(batches)])
        results.append(list(model.parameters()))
    # A difference quotient divides the rounding of the loss by 2 mu.
    tolerance = 1e-12 if case.backward else 1e-10
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance / 10)


@every_case
def test_nothing_is_left_behind(case):
    model = make_model()
    before = frozen(model)
    method = case(model, sgd(model))
    start = [weight.clone() for weight in trainable(model)]
    method.step(loss_fn_of(model), make_batches(2))
    assert not any(map(torch.equal, trainable(model), start))
    assert_left_clean(model, before)


@every_case
def test_gradients_from_before_do_not_count(case):
    results = []
    for stale in (False, True):
        model = make_model()
        method = case(model, sgd(model))
        if stale:
            loss_fn_of(model)(make_batches(1)[0]).backward()
        method.step(loss_fn_of(model), make_batches(2))
        results.append(list(model.parameters()))
    for mine, expected in zip(*results, strict=True):
        tolerances.assert_same_bits(mine, expected)


@every_case
@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "backward", "optimizer"])
def test_an_error_leaves_clean_weights_and_no_gradients(monkeypatch, case, error, where):
    model = make_model()
    before = frozen(model)
    adapters = [weight.detach().clone() for weight in trainable(model)]
    method = case(model, sgd(model))

    def fail(*_):
        raise error

    def loss_fn(batch):
        loss = loss_fn_of(model)(batch)
        if batch is batches[1]:
            if where == "loss":
                fail()
            if where == "backward":
                loss.register_hook(fail) if case.backward else fail()
        return loss

    batches = make_batches(2)
    if where == "optimizer":
        monkeypatch.setattr(method.optimizer, "step", fail)
    with pytest.raises(error):
        method.step(loss_fn, batches)
    assert_left_clean(model, before)
    for weight, value in zip(trainable(model), adapters, strict=True):
        tolerances.assert_same_bits(weight, value)
    monkeypatch.undo()
    method.step(loss_fn_of(model), batches)


WRONG_LOSS = [
    (lambda y: y.mean().item(), TypeError, "loss must be Tensor, got float"),
    (lambda y: None, TypeError, "loss must be Tensor, got NoneType"),
    (lambda y: y.mean(0), ValueError, r"loss must be a scalar, got float32 \[3\]"),
    (lambda y: y.mean().detach(), RuntimeError, "no gradient"),
]


@every_case
@pytest.mark.parametrize(("loss", "error", "text"), WRONG_LOSS)
def test_wrong_losses(case, loss, error, text):
    if error is RuntimeError and not case.backward:
        pytest.skip("needs no gradient")
    model = make_model()
    before = copies(model)
    method = case(model, sgd(model))
    with pytest.raises(error, match=text):
        method.step(lambda batch: loss(model(batch)), make_batches(2))
    assert_left_clean(model, before)


@cases(lambda case: case.backward)
def test_gradients_that_are_off(case):
    model = make_model()
    method = case(model, sgd(model))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no gradient"):
        method.step(loss_fn_of(model), make_batches(1))


WRONG_BATCHES = [
    ([], ValueError, "at least one batch"),
    ((), ValueError, "at least one batch"),
    (torch.ones(4, 6), TypeError, "batches must be list or tuple, got Tensor"),
    (None, TypeError, "batches"),
    (iter([]), TypeError, "batches"),
    ({"x": 1}, TypeError, "batches"),
]


@every_case
@pytest.mark.parametrize(("batches", "error", "text"), WRONG_BATCHES)
def test_wrong_batches(case, batches, error, text):
    model = make_model()
    method = case(model, sgd(model))
    with pytest.raises(error, match=text):
        method.step(loss_fn_of(model), batches)
    with pytest.raises(TypeError, match="loss_fn"):
        method.step(torch.ones(()), make_batches(1))


@every_case
def test_wrong_models_and_optimizers(case):
    model = make_model()
    optimizer = sgd(model)
    with pytest.raises(TypeError, match="model must be Module"):
        case([model], optimizer)
    with pytest.raises(TypeError, match="optimizer must be Optimizer"):
        case(model, trainable(model))
    with pytest.raises(ValueError, match=r"made before .* got none of \['0\.lora_A', "):
        case(model, torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"got none of \['2\.lora_B'\]"):
        case(model, torch.optim.SGD(trainable(model)[:-1], lr=0.1))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        case(model, optimizer)


def test_a_loss_in_low_precision_is_averaged_wide():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    method = LoRA(model, torch.optim.SGD(model.parameters(), lr=0.0))
    values = [256.0, 1.0, 1.0, 1.0]

    def loss_fn(batch):
        return (model.weight.sum() * 0 + batch).to(torch.bfloat16)

    assert method.step(loss_fn, values) == sum(values) / 4


@every_case
def test_state_is_checked(case):
    model = make_model()
    method = case(model, sgd(model))
    for state, error in (({"other": 1}, ValueError), ([], TypeError)):
        with pytest.raises(error):
            method.load_state_dict(state)
    method.load_state_dict(method.state_dict())


def test_a_method_needs_to_override_nothing_but_gradient():
    class Signs(LoRA):
        def gradient(self, loss_fn, batches):
            loss = self.mean_gradient(loss_fn, batches)
            for weight in trainable(self.model):
                weight.grad.sign_()
            return loss

    model = make_model()
    start = [weight.detach().clone() for weight in trainable(model)]
    Signs(model, sgd(model, lr=0.25)).step(loss_fn_of(model), make_batches(1))
    for weight, before in zip(trainable(model), start, strict=True):
        torch.testing.assert_close((weight - before).abs(), torch.full_like(before, 0.25))


def test_the_optimizer_may_hold_more_than_the_model():
    model = make_model()
    extra = nn.Parameter(torch.zeros(3))
    LoRA(model, torch.optim.SGD([*model.parameters(), extra], lr=0.1))


@cases(lambda case: case.quiet is not None)
def test_without_its_noise_or_radius_it_is_lora_bit_for_bit(case):
    ours, theirs = make_model(), make_model()
    method = case(ours, torch.optim.AdamW(trainable(ours), lr=1e-2), **case.quiet)
    lora = LoRA(theirs, torch.optim.AdamW(trainable(theirs), lr=1e-2))
    for count in (1, 3, 2):
        batches = make_batches(count)
        assert method.step(loss_fn_of(ours), batches) == lora.step(loss_fn_of(theirs), batches)
        assert_parameters(ours, copies(theirs))


@cases(lambda case: case.quiet != {})
def test_with_it_it_is_not(case):
    ours, theirs = make_model(), make_model()
    for method, model in ((case(ours, sgd(ours)), ours), (LoRA(theirs, sgd(theirs)), theirs)):
        for _ in range(2):
            method.step(loss_fn_of(model), make_batches(2))
    assert not any(map(torch.equal, trainable(ours), trainable(theirs)))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_descends_and_frozen_weights_stay(case, dtype):
    model = make_model(dtype)
    # One random direction at a time needs more and smaller steps; EntropySGD's weights go only
    # a part of its walk.
    steps, lr = (6, 1e-2) if case.backward else (12, 2e-3)
    steps *= 2 if case.type is EntropySGD else 1
    method = case(model, sgd(model, lr=lr))
    before = frozen(model)
    batches = make_batches(2, dtype)

    def clean_loss():
        with torch.no_grad():
            return sum(loss_fn_of(model)(batch).item() for batch in batches)

    start = clean_loss()
    for _ in range(steps):
        method.step(loss_fn_of(model), batches)
    assert clean_loss() < 0.8 * start
    assert_left_clean(model, before)


@every_case
def test_repeated_and_resumed_runs_give_the_same_bits(case):
    def make():
        model = make_model()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, case(model, optimizer)

    def train(parts, steps):
        torch.manual_seed(len(runs))
        for _ in range(steps):
            parts[2].step(loss_fn_of(parts[0]), make_batches(2))

    runs = []
    for _ in range(2):
        runs.append(make())
        train(runs[-1], 3)
    assert_parameters(runs[0][0], copies(runs[1][0]))
    first, resumed = make(), make()
    train(first, 2)
    for part, before in zip(resumed, first, strict=True):
        part.load_state_dict(copy.deepcopy(before.state_dict()))
    train(first, 1)  # Its state belongs to it alone.
    train(resumed, 1)
    assert_parameters(resumed[0], copies(runs[0][0]))


@every_case
def test_no_global_generator_is_read(case):
    model = make_model()
    method = case(model, sgd(model))
    state = torch.get_rng_state()
    method.step(loss_fn_of(model), make_batches(2))
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_a_scaler_changes_no_bit_and_skips_what_overflows(case):
    # A power of two commutes with every rounding of the backward, and here with the steps too:
    # 1e-12 beside a norm, the one place where the scale shows, is below float32's resolution.
    results = []
    for enabled in (False, True):
        model = make_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        method = case(model, torch.optim.AdamW(trainable(model), lr=1e-2), scaler=scaler)
        for count in (1, 2, 3):
            method.step(loss_fn_of(model), make_batches(count))
        results.append(copies(model))
    assert_parameters(model, results[0])
    state = copy.deepcopy(method.state_dict())
    method.step(lambda batch: loss_fn_of(model)(batch) * torch.inf, make_batches(2))
    assert_parameters(model, results[0])
    assert scaler.get_scale() == 2.0**9
    for key in state.keys() - {"noise", "seed", "step"}:
        torch.testing.assert_close(method.state_dict()[key], state[key], rtol=0, atol=0)
    method.step(loss_fn_of(model), make_batches(1))
    assert all(weight.isfinite().all() for weight in trainable(model))
    assert not any(
        torch.equal(p, results[0][n]) for n, p in model.named_parameters() if n[2:6] == "lora"
    )


@every_case
def test_a_step_that_failed_under_a_scaler_can_be_repeated(monkeypatch, case):
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    method = case(model, sgd(model), scaler=scaler)
    before = copies(model)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(method.optimizer, "step", fail)
        with pytest.raises(MemoryError):
            method.step(loss_fn_of(model), make_batches(1))
    assert_parameters(model, before)
    assert scaler.get_scale() == 4.0
    method.step(loss_fn_of(model), make_batches(1))
    assert not torch.equal(model[0].lora_B, before["0.lora_B"])


# BAR balances and NoisyTune tunes beside the update; a walk up 100 times the loss has no end.
@cases(lambda case: case.type not in (BAR, NoisyTune, EntropySGD))
def test_the_updates_gradient_is_clipped(case):
    model = make_model()
    before = copies(model)
    case(model, sgd(model, lr=1.0), max_grad_norm=1e-3).step(
        lambda batch: 100 * loss_fn_of(model)(batch), make_batches(2)
    )
    moved = torch.stack([(p - before[n]).norm() for n, p in model.named_parameters()]).norm()
    # torch divides by norm + 1e-6; the difference of float32 weights near 1 has 6e-8 an element.
    torch.testing.assert_close(moved.item(), 1e-3, rtol=1e-3, atol=0.0)


@every_case
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"max_grad_norm": 0.0}, ValueError),
        ({"max_grad_norm": float("nan")}, ValueError),
        ({"max_grad_norm": "1"}, TypeError),
        ({"scaler": 2.0}, TypeError),
        ({"typo": 1}, TypeError),
    ],
    ids=str,
)
def test_shared_options_are_checked(case, option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        case(model, sgd(model), **option)


@every_case
def test_an_optimizer_that_needs_a_closure_is_refused(case):
    model = make_model()
    with pytest.raises(ValueError, match="without a closure, got LBFGS"):
        case(model, torch.optim.LBFGS(trainable(model)))
    scheduled = sgd(model)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)  # It wraps optimizer.step.
    case(model, scheduled)


@cases(lambda case: case.quiet is not None)
def test_batch_norms_count_a_batch_once(case):
    torch.manual_seed(0)
    model = nn.Sequential(make_model(), nn.BatchNorm1d(3))
    batches = make_batches(2)
    clean = copy.deepcopy(model)
    for batch in batches:
        clean(batch)
    # Without noise every pass sees the same statistics, so only counting twice could change them.
    case(model, sgd(model), **case.quiet).step(loss_fn_of(model), batches)
    assert model[1].num_batches_tracked == 2
    assert model[1].track_running_stats
    tolerances.assert_same_bits(model[1].running_mean, clean[1].running_mean)
    tolerances.assert_same_bits(model[1].running_var, clean[1].running_var)


@every_case
@pytest.mark.parametrize("layer", [DoRALinear, NoRALinear, BDALinear])
def test_other_kinds_of_adapter(case, layer):
    model = make_model(layer=layer)
    before = copies(model)
    # Those are about A and B, which NoRA does not train, with W' = W + s B A.
    if layer is not DoRALinear and issubclass(case.type, PAIRED):
        with pytest.raises(ValueError, match="lora_A and lora_B are trained, with nothing between"):
            case(model, sgd(model))
        return
    method = case(model, sgd(model, lr=1e-3))
    for _ in range(2):
        method.step(loss_fn_of(model), make_batches(2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad


@every_case
def test_whole_models_without_adapters(case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    if case.adapters:
        with pytest.raises(ValueError, match="must have LoRALinear layers"):
            case(model, sgd(model))
        return
    method = case(model, sgd(model, lr=1e-3))
    before = copies(model)
    method.step(loss_fn_of(model), make_batches(2))
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name])


# One of each way to change what a compiled forward sees: noise in layers, hooks, weights.
COMPILED = ("FlatLoRA", "SAM-merged", "SmoothOut-0.1")


@cases(lambda case: str(case) in COMPILED)
def test_a_compiled_model_takes_the_same_steps(case):
    """Its forward is traced; noise, perturbed weights and gradients are data to it."""
    results = []
    for compiled in (False, True):
        model = make_model()
        seen = torch.compile(model, backend="eager") if compiled else model
        method = case(model, sgd(model))
        for _ in range(2):
            method.step(loss_fn_of(seen), make_batches(2))
        results.append(copies(model))
    assert_parameters(model, results[0])
