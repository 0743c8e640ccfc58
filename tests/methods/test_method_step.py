"""What every method's step promises: the mean gradient, one update, nothing left behind."""

import pytest
import tolerances
import torch
from torch import nn

import flatkern
from flatkern.methods import FlatLoRA, LoRA

METHODS = [LoRA, FlatLoRA, lambda *args: FlatLoRA(*args, mode="inplace")]
every_method = pytest.mark.parametrize("method_type", METHODS)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    flatkern.nn.replace_linear(model, "all-linear", r=2, init_lora_weights=False)
    return model


def trainable(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def make_batches(count, dtype=torch.float32, rows=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator, dtype=dtype) for _ in range(count)]


def loss_fn_of(model):
    return lambda batch: model(batch).square().mean()


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_left_clean(model, before):
    assert all(weight.grad is None for weight in model.parameters())
    for name, value in before.items():
        tolerances.assert_same_bits(model.get_parameter(name), value)


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


@every_method
def test_micro_batches_are_one_batch(method_type):
    results = []
    for split in (False, True):
        model = make_model(torch.float64)
        method = method_type(model, torch.optim.SGD(trainable(model), lr=0.5))
        batches = make_batches(4, torch.float64)
        for _ in range(3):
            method.step(loss_fn_of(model), batches if split else [torch.cat(batches)])
        results.append(list(model.parameters()))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


@every_method
def test_nothing_is_left_behind(method_type):
    model = make_model()
    before = frozen(model)
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
    start = [weight.clone() for weight in trainable(model)]
    method.step(loss_fn_of(model), make_batches(2))
    assert not any(map(torch.equal, trainable(model), start))
    assert_left_clean(model, before)


@every_method
def test_gradients_from_before_do_not_count(method_type):
    results = []
    for stale in (False, True):
        model = make_model()
        method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
        if stale:
            loss_fn_of(model)(make_batches(1)[0]).backward()
        method.step(loss_fn_of(model), make_batches(2))
        results.append(list(model.parameters()))
    for mine, expected in zip(*results, strict=True):
        tolerances.assert_same_bits(mine, expected)


@every_method
@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "backward", "optimizer"])
def test_an_error_leaves_clean_weights_and_no_gradients(monkeypatch, method_type, error, where):
    model = make_model()
    before = frozen(model)
    adapters = [weight.detach().clone() for weight in trainable(model)]
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))

    def fail(*_):
        raise error

    def loss_fn(batch):
        loss = loss_fn_of(model)(batch)
        if batch is batches[1]:
            if where == "loss":
                fail()
            if where == "backward":
                loss.register_hook(fail)
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


@every_method
@pytest.mark.parametrize(("loss", "error", "text"), WRONG_LOSS)
def test_wrong_losses(method_type, loss, error, text):
    model = make_model()
    before = frozen(model)
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
    with pytest.raises(error, match=text):
        method.step(lambda batch: loss(model(batch)), make_batches(2))
    assert_left_clean(model, before)


@every_method
def test_gradients_that_are_off(method_type):
    model = make_model()
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
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


@every_method
@pytest.mark.parametrize(("batches", "error", "text"), WRONG_BATCHES)
def test_wrong_batches(method_type, batches, error, text):
    model = make_model()
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
    with pytest.raises(error, match=text):
        method.step(loss_fn_of(model), batches)
    with pytest.raises(TypeError, match="loss_fn"):
        method.step(torch.ones(()), make_batches(1))


@every_method
def test_wrong_models_and_optimizers(method_type):
    model = make_model()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(TypeError, match="model must be Module"):
        method_type([model], optimizer)
    with pytest.raises(TypeError, match="optimizer must be Optimizer"):
        method_type(model, trainable(model))
    with pytest.raises(ValueError, match=r"made before .* got none of \['0\.lora_A', "):
        method_type(model, torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"got none of \['2\.lora_B'\]"):
        method_type(model, torch.optim.SGD(trainable(model)[:-1], lr=0.1))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        method_type(model, optimizer)


def test_a_loss_in_low_precision_is_averaged_wide():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    method = LoRA(model, torch.optim.SGD(model.parameters(), lr=0.0))
    values = [256.0, 1.0, 1.0, 1.0]

    def loss_fn(batch):
        return (model.weight.sum() * 0 + batch).to(torch.bfloat16)

    assert method.step(loss_fn, values) == sum(values) / 4


@every_method
def test_state_is_checked(method_type):
    model = make_model()
    method = method_type(model, torch.optim.SGD(trainable(model), lr=0.1))
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
    Signs(model, torch.optim.SGD(trainable(model), lr=0.25)).step(
        loss_fn_of(model), make_batches(1)
    )
    for weight, before in zip(trainable(model), start, strict=True):
        torch.testing.assert_close((weight - before).abs(), torch.full_like(before, 0.25))


def test_the_optimizer_may_hold_more_than_the_model():
    model = make_model()
    extra = nn.Parameter(torch.zeros(3))
    LoRA(model, torch.optim.SGD([*model.parameters(), extra], lr=0.1))
