"""BAR's balancing: B A times 1 - a^2 lr^2, and which adapter grows."""

import math

import pytest
import torch
from method_cases import (
    assert_parameters,
    copies,
    loss_fn_of,
    make_batches,
    make_model,
    sgd,
    trainable,
)

from flatkern.methods import BAR, LoRA

LAYERS = (0, 2)


def balanced(model, **options):
    """A, B and their gradients before the step, and A and B as the optimizer finds them."""
    optimizer = sgd(model, lr=0.1)
    before, after, gradients = copies(model), {}, {}

    def look(*_):
        after.update(copies(model))
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if "lora" in n})

    optimizer.register_step_pre_hook(look)
    BAR(model, optimizer, **options).step(loss_fn_of(model), make_batches(2, torch.float64))
    return before, after, gradients


@pytest.mark.parametrize("variant", ["nBAR", "oBAR"])
@pytest.mark.parametrize("large", ["lora_A", "lora_B"])
def test_the_product_shrinks_by_one_minus_alpha_squared_rate_squared(variant, large):
    model = make_model(torch.float64)
    with torch.no_grad():
        for index in LAYERS:
            getattr(model[index], large).mul_(20)
    before, after, gradients = balanced(model, alpha=2.0, variant=variant)
    for index in LAYERS:
        A, B = f"{index}.lora_A", f"{index}.lora_B"
        torch.testing.assert_close(
            after[B] @ after[A], before[B] @ before[A] * (1 - 0.2**2), rtol=1e-12, atol=1e-14
        )
        grows_B = (
            gradients[B].norm() >= gradients[A].norm()
            if variant == "nBAR"
            else before[B].norm() < before[A].norm()
        )
        # The larger factor has the smaller gradient: both variants shrink it.
        assert grows_B == (large == "lora_A")
        factor = 1.2 if grows_B else 0.8
        torch.testing.assert_close(after[B], before[B] * factor, rtol=1e-12, atol=0)
        torch.testing.assert_close(after[A], before[A] * (2 - factor), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["nBAR", "oBAR"])
def test_at_zero_b_both_shrink_a(variant):
    model = make_model(torch.float64)
    for index in LAYERS:
        model[index].lora_B.data.zero_()
    before, after, _ = balanced(model, variant=variant)
    for index in LAYERS:
        A = f"{index}.lora_A"
        torch.testing.assert_close(after[A], before[A] * 0.9, rtol=1e-12, atol=0)


def test_the_update_follows_the_balancing():
    ours, theirs = make_model(torch.float64), make_model(torch.float64)
    _, after, gradients = balanced(ours)
    for name, p in theirs.named_parameters():
        if name in gradients:
            p.data.copy_(after[name] - 0.1 * gradients[name])
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-14, atol=1e-15)


def test_the_schedule_counts_updates_and_is_saved():
    def decay(step):
        return 1 - step / 4

    asked = []
    model = make_model()
    method = BAR(model, sgd(model), schedule=lambda step: asked.append(step) or decay(step))
    for _ in range(3):
        method.step(loss_fn_of(model), make_batches(1))
    assert asked == [0, 1, 2]
    assert method.state_dict() == {"step": 3}
    ours, theirs = make_model(), make_model()
    bar = BAR(ours, sgd(ours), schedule=decay)
    bar.load_state_dict({"step": 4})
    bar.step(loss_fn_of(ours), make_batches(1))
    LoRA(theirs, sgd(theirs)).step(loss_fn_of(theirs), make_batches(1))
    assert_parameters(ours, copies(theirs))


def test_the_rate_is_that_of_bs_group():
    model = make_model(torch.float64)
    before = copies(model)
    groups = [
        {"params": [model[i].lora_A for i in LAYERS], "lr": 0.0},
        {"params": [model[i].lora_B for i in LAYERS], "lr": 0.3},
    ]
    BAR(model, torch.optim.SGD(groups), variant="oBAR").step(
        loss_fn_of(model), make_batches(1, torch.float64)
    )
    grows_A = before["0.lora_B"].norm() >= before["0.lora_A"].norm()
    factor = 1.3 if grows_A else 0.7
    torch.testing.assert_close(model[0].lora_A.data, before["0.lora_A"] * factor)


WRONG = [
    ({"alpha": -1.0}, ValueError),
    ({"alpha": math.nan}, ValueError),
    ({"variant": "BAR"}, ValueError),
    ({"schedule": 0.5}, TypeError),
]


@pytest.mark.parametrize(("option", "error"), WRONG, ids=str)
def test_options_are_checked(option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        BAR(model, sgd(model), **option)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 20.0}, "alpha must be below 1 / the learning rate"),
        ({"schedule": lambda step: -1.0}, r"schedule\(0\) must be finite and at least 0"),
    ],
)
def test_what_would_turn_the_adapters_around_is_refused(options, text):
    model = make_model()
    before = copies(model)
    with pytest.raises(ValueError, match=text):
        BAR(model, sgd(model), **options).step(loss_fn_of(model), make_batches(1))
    assert_parameters(model, before)


def test_state_is_checked():
    model = make_model()
    method = BAR(model, torch.optim.SGD(trainable(model), lr=0.1))
    for state, error in (({"step": -1}, ValueError), ({"step": 1.0}, TypeError)):
        with pytest.raises(error, match="step"):
            method.load_state_dict(state)
    assert method.state_dict() == {"step": 0}


def test_a_model_whose_adapters_are_not_both_trained():
    model = make_model()
    for index in LAYERS:
        model[index].lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match="whose lora_A and lora_B are trained"):
        BAR(model, sgd(model))
