"""LoRA-Pro against least squares over all gradients of A and B, and its own equations."""

import pytest
import tolerances
import torch
from method_cases import Case, copies, make_batches, make_model, sgd, step_gradients
from torch import nn
from torch.func import functional_call

from flatkern.methods import LoRA, LoRAPro
from flatkern.methods.lora_pro import sylvester

F64 = torch.float64


def sides(model, batches):
    """Of each layer A, B, s, dA, dB and G, the gradient of its merged weight."""
    own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = [functional_call(model, own, b).square().mean() for b in batches]
    slopes = torch.autograd.grad(sum(losses) / len(losses), list(own.values()))
    slopes = dict(zip(own, slopes, strict=True))
    for layer in ("0", "2"):
        parts = [own[f"{layer}.lora_{x}"].detach() for x in "AB"]
        gradients = [slopes[f"{layer}.{x}"] for x in ("lora_A", "lora_B", "weight")]
        yield layer, *parts, model[int(layer)].scaling, *gradients


def nearest(A, B, s, dA, dB, G):
    """The minimiser of ||s (B a + b A) - G|| that is nearest to (dA, dB), by a pseudo-inverse.

    Of the linear map on all of (a, b), without LoRA-Pro's equations.
    """
    (r, n), m = A.shape, B.shape[0]
    eye_n, eye_m = torch.eye(n, dtype=F64), torch.eye(m, dtype=F64)
    # Row-major: vec(B a) = (B x 1) vec(a), vec(b A) = (1 x A') vec(b).
    K = s * torch.cat([torch.kron(B, eye_n), torch.kron(eye_m, A.t().contiguous())], 1)
    start = torch.cat([dA.flatten(), dB.flatten()])
    x = start + torch.linalg.pinv(K, rtol=1e-10) @ (G.flatten() - K @ start)
    return x[: r * n].view(r, n), x[r * n :].view(m, r)


def found_in(model, batches):
    got, _ = step_gradients(Case(LoRAPro), model, batches)
    return got


@pytest.mark.parametrize("zero", ["none", "B", "column"])
def test_it_is_the_nearest_of_the_best(zero):
    model, batches = make_model(F64), make_batches(3, F64)
    for layer in (model[0], model[2]):
        with torch.no_grad():
            if zero == "B":
                layer.lora_B.zero_()
            elif zero == "column":
                layer.lora_B[:, 0] = 0
    before = copies(model)
    got = found_in(model, batches)
    for layer, *given in sides(model, batches):
        a, b = nearest(*given)
        torch.testing.assert_close(got[f"{layer}.lora_A"], a, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(got[f"{layer}.lora_B"], b, rtol=1e-7, atol=1e-9)
    for name, value in before.items():
        tolerances.assert_same_bits(model.get_parameter(name).detach(), value)


def test_the_move_of_the_merged_weight_is_a_projection():
    """s (B a + b A) = P_B G + (1 - P_B) G P_A; and no other a, b come nearer to G."""
    model, batches = make_model(F64), make_batches(2, F64)
    got = found_in(model, batches)
    generator = torch.Generator().manual_seed(0)
    for layer, A, B, s, dA, dB, G in sides(model, batches):
        a, b = got[f"{layer}.lora_A"], got[f"{layer}.lora_B"]
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        move = s * (B @ a + b @ A)
        torch.testing.assert_close(move, P_B @ G + (G - P_B @ G) @ P_A, rtol=1e-8, atol=1e-10)
        distance = (move - G).norm()
        assert distance < (s * (B @ dA + dB @ A) - G).norm()
        for _ in range(20):
            other = [
                p + 0.01 * torch.randn(p.shape, generator=generator, dtype=F64) for p in (a, b)
            ]
            assert (s * (B @ other[0] + other[1] @ A) - G).norm() >= distance


def test_the_loss_falls_to_first_order():
    """Source, theorem 2.2: dL = -lr (<dA, a> + <dB, b>) <= 0."""
    model, batches = make_model(F64), make_batches(2, F64)
    got = found_in(model, batches)
    for layer, A, B, s, dA, dB, G in sides(model, batches):
        inner = (dA * got[f"{layer}.lora_A"]).sum() + (dB * got[f"{layer}.lora_B"]).sum()
        move = s * (B @ got[f"{layer}.lora_A"] + got[f"{layer}.lora_B"] @ A)
        torch.testing.assert_close(inner, (G * move).sum(), rtol=1e-9, atol=0)
        assert inner > 0


@pytest.mark.parametrize("singular", [False, True])
def test_sylvester(singular):
    generator = torch.Generator().manual_seed(0)
    P, Q, X = torch.randn(3, 4, 4, generator=generator, dtype=F64).unbind()
    P, Q = P @ P.t(), Q @ Q.t()
    if singular:
        P = torch.zeros_like(P)
    found = sylvester(P, Q, P @ X + X @ Q)
    torch.testing.assert_close(found, X, rtol=1e-7, atol=1e-8)
    assert sylvester(P * 0, Q * 0, X).eq(0).all()


def test_other_parameters_train_as_they_are():
    model = make_model(F64)
    model[2].bias.requires_grad_(True)
    plain, _ = step_gradients(Case(LoRA), make_model_with_bias(), make_batches(2, F64))
    got = found_in(model, make_batches(2, F64))
    tolerances.assert_same_bits(got["2.bias"], plain["2.bias"])
    assert not torch.equal(got["2.lora_A"], plain["2.lora_A"])


def make_model_with_bias():
    model = make_model(F64)
    model[2].bias.requires_grad_(True)
    return model


def test_a_model_without_pairs():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="must have LoRALinear layers"):
        LoRAPro(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = make_model()
    for layer in (model[0], model[2]):
        layer.lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match="whose lora_A and lora_B are trained"):
        LoRAPro(model, sgd(model))
