"""Flat-LoRA: W' + e in every forward of the step, clean weights everywhere else."""

import copy
import math

import pytest
import tolerances
import torch
from method_cases import loss_fn_of, make_batches, make_model, trainable
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flatkern
from flatkern.methods import FlatLoRA

both_modes = pytest.mark.parametrize("mode", ["virtual", "inplace"])


def assert_same_parameters(ours, theirs):
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        tolerances.assert_same_bits(mine, expected)


@both_modes
def test_it_is_the_loop_of_the_contract(mode):
    ours, theirs = make_model(), make_model()
    optimizers = [torch.optim.AdamW(trainable(model), lr=1e-2) for model in (ours, theirs)]
    ramp = flatkern.cosine_ramp(4)
    method = FlatLoRA(ours, optimizers[0], sigma=0.4, schedule=ramp, mode=mode, seed=5)
    noise = flatkern.WeightNoise(theirs, 0.4, schedule=ramp, mode=mode, seed=5)
    for _ in range(6):
        batches = make_batches(2)
        loss = method.step(loss_fn_of(ours), batches)
        total = 0.0
        with noise.window():
            for batch in batches:
                part = loss_fn_of(theirs)(batch)
                total += part.item()
                (part / 2).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert loss == pytest.approx(total / 2, rel=1e-6)
        assert_same_parameters(ours, theirs)


def test_with_noise_it_is_not():
    results = [make_model() for _ in range(3)]
    for model, sigma, seed in zip(results, (0.0, 0.3, 0.3), (0, 0, 1), strict=True):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        FlatLoRA(model, optimizer, sigma=sigma, seed=seed).step(loss_fn_of(model), make_batches(1))
    adapters = [model[0].lora_B for model in results]
    assert not torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[1], adapters[2])


def test_the_modes_agree():
    results = []
    for mode in ("virtual", "inplace"):
        model = make_model(torch.float64)
        method = FlatLoRA(model, torch.optim.SGD(trainable(model), lr=0.02), sigma=0.5, mode=mode)
        losses = [method.step(loss_fn_of(model), make_batches(2, torch.float64)) for _ in range(10)]
        results.append([torch.tensor(losses), *model.parameters()])
    for virtual, inplace in zip(*results, strict=True):
        torch.testing.assert_close(virtual, inplace, rtol=1e-10, atol=1e-12)


@both_modes
def test_one_draw_per_optimizer_step(mode):
    model = make_model()
    method = FlatLoRA(model, torch.optim.SGD(trainable(model), lr=0.0), sigma=0.5, mode=mode)
    batch = make_batches(1)[0]
    losses = []

    def loss_fn(batch):
        loss = loss_fn_of(model)(batch)
        losses.append(loss.item())
        return loss

    for _ in range(3):
        method.step(loss_fn, [batch] * 4)
    assert len(losses) == 12
    assert [len(set(losses[at : at + 4])) for at in (0, 4, 8)] == [1, 1, 1]
    assert len(set(losses)) == 3
    assert method.noise.step == 3


@both_modes
def test_the_window_is_closed_before_the_optimizer_runs(monkeypatch, mode):
    model = make_model()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    method = FlatLoRA(model, optimizer, sigma=0.5, mode=mode)
    seen = []

    def step():
        seen.append(method.noise.active)
        tolerances.assert_same_bits(model[0].weight, before)

    monkeypatch.setattr(optimizer, "step", step)
    method.step(loss_fn_of(model), make_batches(1))
    assert seen == [False]


@both_modes
def test_resuming_gives_the_same_bits(mode):
    def make():
        model = make_model()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        ramp = flatkern.cosine_ramp(5)
        return model, optimizer, FlatLoRA(model, optimizer, sigma=0.5, schedule=ramp, mode=mode)

    def train(model, method, steps):
        for _ in range(steps):
            method.step(loss_fn_of(model), make_batches(2))

    whole, _, method = make()
    train(whole, method, 6)
    parts = make()
    train(parts[0], parts[2], 3)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    assert states[2] == {"noise": {"seed": 0, "step": 3, "noise_version": 1}}
    resumed = make()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[2], 3)
    assert_same_parameters(resumed[0], whole)


@both_modes
def test_the_mean_loss_and_gradient_over_draws(mode):
    # A quadratic loss: E L = L + 1/2 sum_i c_i^2 mean |x|^2, and E dL is the clean gradient.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    flatkern.nn.replace_linear(model, "all-linear", r=2, init_lora_weights=False)
    layer = model[0]
    x = make_batches(1, torch.float64)[0]

    def loss_fn(batch):
        return model(batch).square().sum(1).mean() / 2

    loss_fn(x).backward()
    clean, clean_grad = loss_fn(x).item(), layer.lora_B.grad.clone()
    merged = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    c = 0.7 / math.sqrt(6) * merged.norm(dim=1)
    expected = clean + 0.5 * (c.square().sum() * x.square().sum(1).mean()).item()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    method = FlatLoRA(model, optimizer, sigma=0.7, mode=mode)
    grads = []
    optimizer.register_step_pre_hook(lambda *_: grads.append(layer.lora_B.grad.clone()))
    losses = torch.tensor([method.step(loss_fn, [x]) for _ in range(400)], dtype=torch.float64)
    assert abs(losses.mean() - expected) < tolerances.Z_SCORE * losses.std() / 20
    assert losses.mean() - clean > tolerances.Z_SCORE * losses.std() / 20
    grads = torch.stack(grads)
    z = (grads.mean(0) - clean_grad) / (grads.std(0) / 20)
    assert z.abs().max() < tolerances.Z_SCORE


@both_modes
def test_the_gradients_of_a_and_b_belong_to_one_gradient_of_the_weight(mode):
    # dA = s B'G and dB = s G A', so B' dB = dA A' for every loss, noisy or not.
    model = make_model(torch.float64)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    method = FlatLoRA(model, optimizer, sigma=0.5, mode=mode)
    checked = []

    def check(*_):
        for layer in (model[0], model[2]):
            left = layer.lora_B.t() @ layer.lora_B.grad
            right = layer.lora_A.grad @ layer.lora_A.t()
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-14)
            checked.append(left.abs().max().item() > 1e-6)

    optimizer.register_step_pre_hook(check)
    method.step(loss_fn_of(model), make_batches(2, torch.float64))
    assert checked == [True, True]


@both_modes
def test_a_transformer_in_bfloat16(mode):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    flatkern.nn.replace_linear(model, "all-linear", r=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    method = FlatLoRA(model, torch.optim.AdamW(trainable(model), lr=5e-2), sigma=0.1, mode=mode)
    ids = torch.randint(50, (4, 9))
    losses = [
        method.step(lambda ids: model(input_ids=ids, labels=ids).loss, [ids]) for _ in range(5)
    ]
    assert losses[-1] < losses[0] - 0.1
    for name, value in before.items():
        tolerances.assert_same_bits(model.get_parameter(name), value)


WRONG = [
    ({"sigma": -1.0}, ValueError),
    ({"sigma": math.nan}, ValueError),
    ({"strategy": "fisher"}, ValueError),
    ({"scope": "base"}, ValueError),
    ({"mode": "fused"}, ValueError),
    ({"seed": -1}, ValueError),
    ({"schedule": "cosine"}, TypeError),
    ({"ranks": "some"}, ValueError),
]


@pytest.mark.parametrize(("option", "error"), WRONG, ids=str)
def test_options_are_checked(option, error):
    model = make_model()
    with pytest.raises(error, match=next(iter(option))):
        FlatLoRA(model, torch.optim.SGD(trainable(model), lr=0.1), **option)


def test_a_model_without_lora_layers():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="nothing to perturb"):
        FlatLoRA(model, torch.optim.SGD(model.parameters(), lr=0.1))
