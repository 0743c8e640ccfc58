"""FMLoRA and EFMLoRA against their definition with m x n matrices, in float64."""

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

from flatkern.methods import EFMLoRA, FMLoRA, fmlora

F64 = torch.float64
LAYERS = (0, 2)
S = 8.0  # lora_alpha / r of the small model


def gradients_at(model, parameters, batches):
    """The mean gradients with these parameters, the frozen weights' included."""
    kept = copies(model)
    for name, value in parameters.items():
        model.get_parameter(name).data.copy_(value)
    for p in model.parameters():
        p.requires_grad_(True)
    for batch in batches:
        (loss_fn_of(model)(batch) / len(batches)).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for name, p in model.named_parameters():
        p.data.copy_(kept[name])
        p.requires_grad_("lora" in name)
    return got


def dense_step(parameters, gradients, index, rho, total=None):
    """The source's E_B, its perturbation of the weight, P_A and ||G||, all dense."""
    A, B = parameters[f"{index}.lora_A"], parameters[f"{index}.lora_B"]
    dA, dB = gradients[f"{index}.lora_A"], gradients[f"{index}.lora_B"]
    pinv = torch.linalg.pinv
    G = (dB @ pinv(A.t()) + pinv(B.t()) @ dA) / (2 * S)
    E = rho * G / (G.norm() if total is None else total)
    return E @ pinv(A) / S, E, pinv(A) @ A, G.norm()


def seen_parameters(method, model, batches):
    """The parameters at each call of the loss, and the update's gradients."""
    seen, grads = [], {}

    def loss_fn(batch):
        seen.append(copies(model))
        return loss_fn_of(model)(batch)

    hook = method.optimizer.register_step_pre_hook(
        lambda *_: grads.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    method.step(loss_fn, batches)
    hook.remove()
    return seen, grads


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["per_layer", "joint"])
@pytest.mark.parametrize("zero_B", [False, True])
def test_the_step_is_the_dense_one(norm, zero_B):
    model = make_model(F64)
    batches = make_batches(2, F64)
    if zero_B:
        for index in LAYERS:
            model[index].lora_B.data.zero_()
    before = copies(model)
    clean = gradients_at(model, before, batches)
    rho = 0.3
    norms = torch.stack([dense_step(before, clean, index, rho)[3] for index in LAYERS])
    total = norms.norm() if norm == "joint" else None
    seen, grads = seen_parameters(FMLoRA(model, sgd(model), rho=rho, norm=norm), model, batches)
    sizes = []
    for index in LAYERS:
        step, E, P_A, _ = dense_step(before, clean, index, rho, total)
        close(seen[2][f"{index}.lora_B"] - before[f"{index}.lora_B"], step)
        close(S * step @ before[f"{index}.lora_A"], E @ P_A)
        sizes.append((S * step @ before[f"{index}.lora_A"]).norm())
    # The projection shortens the step; at B = 0 there is nothing outside the rows of A.
    sizes = torch.stack(sizes) if norm == "per_layer" else torch.stack(sizes).norm()
    assert (sizes <= rho * (1 + 1e-9)).all()
    assert zero_B == bool((sizes >= rho * (1 - 1e-9)).all())
    assert_parameters(model, {name: seen[2][name] for name in before if "weight" in name})
    for index in LAYERS:
        close(seen[2][f"{index}.lora_A"], before[f"{index}.lora_A"])
    expected = gradients_at(model, seen[2], batches)
    for name, value in grads.items():
        close(value, expected[name])


@pytest.mark.parametrize("size", [1e-3, 1e-12, 1e-30])
def test_the_step_does_not_depend_on_the_size_of_b(size):
    # P_B does not, and the Gram matrix of a small B must not be taken for 0.
    steps = []
    for scale in (1.0, size):
        model = make_model(F64)
        layer = model[0]
        A, B = layer.lora_A.detach(), layer.lora_B.detach() * scale
        layer.lora_B.data.copy_(B)
        torch.manual_seed(1)
        G = torch.randn(8, 6, dtype=F64)
        for other in model.parameters():
            other.grad = None
        layer.lora_A.grad, layer.lora_B.grad = S * B.t() @ G, S * G @ A.t()
        steps.append(FMLoRA(model, sgd(model), rho=0.3).steps()["0"])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-9, atol=0)


def test_a_deficient_adapter_is_projected_as_pinv_does():
    model = make_model(F64)
    layer = model[0]
    layer.lora_B.data[:, 1] = 2 * layer.lora_B.data[:, 0]
    layer.lora_A.data[1] = -layer.lora_A.data[0]
    before = copies(model)
    clean = gradients_at(model, before, make_batches(1, F64))
    seen, _ = seen_parameters(FMLoRA(model, sgd(model), rho=0.3), model, make_batches(1, F64))
    step = dense_step(before, clean, 0, 0.3)[0]
    torch.testing.assert_close(seen[1]["0.lora_B"] - before["0.lora_B"], step, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 3e-4, 1e-7])
def test_what_counts_as_deficient_is_what_pinv_says_of_the_factor(ratio):
    generator = torch.Generator().manual_seed(0)
    factor = torch.linalg.qr(torch.randn(40, 2, generator=generator, dtype=F64))[0]
    factor = (factor * torch.tensor([1.0, ratio], dtype=F64)).float()
    pinv = torch.linalg.pinv(factor).double()
    got = fmlora.inverse_gram(factor.t().double() @ factor.double(), factor)
    # Above the cutoff pinv's float32 error is magnified by 1 / ratio.
    error = (got - pinv @ pinv.t()).norm() / got.norm()
    assert error < 1e-2


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_efmlora_is_its_recursion(beta):
    model = make_model(F64)
    batches = make_batches(2, F64)
    method = EFMLoRA(model, sgd(model, lr=5e-3), rho=0.2, beta=beta)
    mean = None
    for _ in range(4):
        point = copies(model)
        if mean is not None:
            for index in LAYERS:
                point[f"{index}.lora_B"] += mean[index]
        gradients = gradients_at(model, point, batches)
        seen, grads = seen_parameters(method, model, batches)
        assert len(seen) == 2  # one pass
        for name, value in grads.items():
            close(seen[0][name], point[name])
            close(value, gradients[name])
        newest = {index: dense_step(point, gradients, index, 0.2)[0] for index in LAYERS}
        # beta = 1: the step that FMLoRA would have made one step ago.
        mean = {
            index: newest[index]
            if mean is None
            else (1 - beta) * mean[index] + beta * newest[index]
            for index in LAYERS
        }
        for index in LAYERS:
            close(method.state_dict()["mean"][f"{index}"], mean[index])


def test_a_failed_update_does_not_move_the_mean(monkeypatch):
    model = make_model()
    method = EFMLoRA(model, sgd(model))
    method.step(loss_fn_of(model), make_batches(1))
    before = method.state_dict()["mean"]

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(method.optimizer, "step", fail)
        with pytest.raises(MemoryError):
            method.step(loss_fn_of(model), make_batches(2))
    for name, value in method.state_dict()["mean"].items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("method_type", "option", "error"),
    [
        (FMLoRA, {"norm": "per_tensor"}, ValueError),
        (FMLoRA, {"rho": -1.0}, ValueError),
        (EFMLoRA, {"rho": float("nan")}, ValueError),
        (EFMLoRA, {"beta": 0.0}, ValueError),
        (EFMLoRA, {"beta": 1.5}, ValueError),
        (EFMLoRA, {"beta": float("nan")}, ValueError),
        (EFMLoRA, {"beta": "1"}, TypeError),
    ],
    ids=str,
)
def test_options_are_checked(method_type, option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        method_type(model, sgd(model), **option)


def test_state_is_checked():
    model = make_model()
    method = EFMLoRA(model, torch.optim.SGD(trainable(model), lr=0.1))
    for mean, error in (
        ([], TypeError),
        ({"7": torch.zeros(8, 2)}, ValueError),
        ({"0": torch.zeros(2, 8)}, ValueError),
        ({"0": 1.0}, TypeError),
    ):
        with pytest.raises(error, match="mean"):
            method.load_state_dict({"mean": mean})
    assert method.state_dict() == {"mean": {}, "seed": 0, "step": 0, "rho": 0.05}


def test_a_model_whose_adapters_are_not_both_trained():
    model = make_model()
    for index in LAYERS:
        model[index].lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match="whose lora_A and lora_B are trained"):
        FMLoRA(model, sgd(model))
