"""Methods on PEFT's LoRA layers, attached to or not, against flatkern's own on the same values."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, get_peft_model

import flatkern
from flatkern import methods
from flatkern.integrations.peft import attach, detach
from flatkern.nn import DoRALinear, LoRALinear, replace_linear

F64 = torch.float64
CASES = {
    "LoRA": (methods.LoRA, {}),
    "SAM": (methods.SAM, {"rho": 0.3}),
    "SAM-merged": (methods.SAM, {"rho": 0.3, "scope": "merged"}),
    "ASAM": (methods.ASAM, {"rho": 0.3}),
    "LoRASAM": (methods.LoRASAM, {"rho": 0.3}),
    "LoRASAM-per_tensor": (methods.LoRASAM, {"rho": 0.3, "norm": "per_tensor"}),
    "nBAR": (methods.BAR, {"alpha": 0.5}),
    "oBAR": (methods.BAR, {"alpha": 0.5, "variant": "oBAR"}),
    "FMLoRA": (methods.FMLoRA, {"rho": 0.3}),
    "FMLoRA-joint": (methods.FMLoRA, {"rho": 0.3, "norm": "joint"}),
    "EFMLoRA": (methods.EFMLoRA, {"rho": 0.3}),
    "ARWP-merged": (methods.ARWP, {"sigma": 0.1, "eta": 50.0, "scope": "merged"}),
    "mARWP-merged": (
        methods.MixedRWP,
        {"sigma": 0.1, "eta": 50.0, "scope": "merged", "strategy": "fisher"},
    ),
    "FlatLoRA": (methods.FlatLoRA, {"sigma": 0.3}),
}
NOISY = ("ARWP-merged", "mARWP-merged", "FlatLoRA")
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
# flatkern's DoRA takes ||V|| in float32.
CLOSE = {"lora": 1e-9, "rslora": 1e-9, "dora": 1e-5}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64)


def of_peft(**options):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], **options)
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def of_flatkern(peft_model, use_dora=False, **options):
    model = base()
    layer = DoRALinear if use_dora else LoRALinear
    replace_linear(model, ["0", "2"], r=2, lora_alpha=3, layer=layer, **options)
    own, theirs = trained(model), trained(peft_model)
    with torch.no_grad():
        # PEFT lists A, B, magnitude of a layer; so does flatkern.
        for mine, value in zip(own, theirs, strict=True):
            mine.copy_(value)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, case, steps=3):
    kind, options = CASES[case]
    generator = torch.Generator().manual_seed(3)
    method = kind(model, torch.optim.SGD(trained(model), lr=0.1, momentum=0.9), **options)
    losses = []
    for _ in range(steps):
        batches = [torch.randn(5, 6, generator=generator, dtype=F64) for _ in range(2)]
        losses.append(method.step(lambda x: model(x).square().mean(), batches))
    return torch.cat([torch.tensor(losses), *(p.detach().flatten() for p in trained(model))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_as_on_flatkern_s_layers(case, kind):
    model = of_peft(**KINDS[kind])
    own = of_flatkern(model, **KINDS[kind])
    names, before = list(model.state_dict()), copy.deepcopy(model)
    expected = train(own, case)
    close = {"rtol": CLOSE[kind], "atol": CLOSE[kind] / 100}
    if case not in NOISY:
        torch.testing.assert_close(train(model, case), expected, **close)
    attach(before)
    torch.testing.assert_close(train(before, case), expected, **close)
    detach(before)
    assert list(before.state_dict()) == names


@pytest.mark.parametrize("case", NOISY)
def test_noise_on_base_weights_names_attach(case):
    with pytest.raises(ValueError, match="attach"):
        train(of_peft(), case)


@pytest.mark.parametrize("case", ["FMLoRA", "EFMLoRA"])
def test_two_active_adapters_are_one_of_their_ranks_together(case):
    # W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2], of one ball.
    model = of_peft()
    model.add_adapter("more", LoraConfig(r=1, lora_alpha=5, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "more"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.more" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=F64))
    model.to(F64)
    own = base()
    replace_linear(own, ["0", "2"], r=3, lora_alpha=3)
    layers = [model.base_model.model[i] for i in (0, 2)]
    with torch.no_grad():
        for mine, layer in zip((own[0], own[2]), layers, strict=True):
            A, B = layer.lora_A, layer.lora_B
            mine.lora_A.copy_(torch.cat([A["default"].weight, A["more"].weight]))
            mine.lora_B.copy_(torch.cat([1.5 * B["default"].weight, 5 * B["more"].weight], 1))
    seen = []
    for each in (model, own):
        points = []

        def loss_fn(x, each=each, points=points):
            points.append(each(x).detach())
            return each(x).square().mean()

        kind, options = CASES[case]
        optimizer = torch.optim.SGD(trained(each), lr=0.0)
        method = kind(each, optimizer, **options)
        for _ in range(2):
            method.step(loss_fn, [torch.ones(5, 6, dtype=F64)])
        seen.append(points)
    for mine, right in zip(*seen, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_a_frozen_adapter_is_a_part_of_the_weight():
    model = of_peft()
    for p in trained(model):
        p.requires_grad_(False)
    model.add_adapter("more", LoraConfig(r=1, lora_alpha=5, target_modules=["0"]))
    model.base_model.set_adapter(["default", "more"])
    for name, p in model.named_parameters():
        p.requires_grad_("more" in name)
    method = methods.BAR(model, torch.optim.SGD(trained(model), lr=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.step(lambda x: model(x).square().mean(), [torch.ones(5, 6, dtype=F64)])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("more" not in name), name


def test_a_state_of_peft_s_layers_is_loaded():
    model = of_peft()
    make = lambda: methods.EFMLoRA(model, torch.optim.SGD(trained(model), lr=0.1))  # noqa: E731
    method = make()
    method.step(lambda x: model(x).square().mean(), [torch.ones(5, 6, dtype=F64)])
    state = method.state_dict()
    assert list(state["mean"]) == ["base_model.model.0.default", "base_model.model.2.default"]
    again = make()
    again.load_state_dict(state)
    for name, value in again.state_dict()["mean"].items():
        assert torch.equal(value, state["mean"][name])


def test_other_adapters_of_peft_are_refused_by_methods_of_pairs():
    from peft import AdaLoraConfig, LoHaConfig

    config = LoHaConfig(r=2, target_modules=["0"])
    for kind in (methods.BAR, methods.FMLoRA, methods.LoRASAM):
        model = get_peft_model(base(), config)
        with pytest.raises(ValueError, match="PEFT's LoRA layers"):
            kind(model, torch.optim.SGD(trained(model), lr=0.1))
    config = AdaLoraConfig(r=2, init_r=3, total_step=10, target_modules=["0"])
    model = get_peft_model(base(), config)
    with pytest.raises(ValueError, match="whose lora_A and lora_B are trained"):
        methods.FMLoRA(model, torch.optim.SGD(trained(model), lr=0.1))
    methods.LoRASAM(model, torch.optim.SGD(trained(model), lr=0.1))


def test_noise_of_attach_and_of_a_method_may_share_a_model():
    model = of_peft()
    attach(model)
    assert isinstance(
        methods.FlatLoRA(model, torch.optim.SGD(trained(model), lr=0.1)).noise, flatkern.WeightNoise
    )
