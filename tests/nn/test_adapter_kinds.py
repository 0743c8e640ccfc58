"""save_adapter and load_adapter for the other kinds of adapter, against PEFT."""

import copy
import json

import pytest
import tolerances
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import flatkern
from flatkern.nn import (
    BDALinear,
    DoRALinear,
    LoRALinear,
    NoRALinear,
    load_adapter,
    lora_ga_init,
    replace_linear,
    save_adapter,
)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 7, dtype=dtype)
        self.last = nn.Linear(7, 6, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.fc(x)))


def train(model):
    """Move whatever is trainable."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.2 * torch.randn_like(value)
    return model.eval()


def adapted(**options):
    model = Net()
    replace_linear(model, "all-linear", **{"r": 3, "lora_alpha": 5, **options})
    return model


def dora():
    return adapted(layer=DoRALinear)


def dora_rslora():
    return adapted(layer=DoRALinear, use_rslora=True, renorm=True)


def pissa():
    return adapted(init_lora_weights="pissa")


def pissa_rslora():
    return adapted(init_lora_weights="pissa", use_rslora=True)


def pissa_dora():
    return adapted(layer=DoRALinear, init_lora_weights="pissa")


def mixed_starts():
    """One layer with an offset base and rank 6 in the file, one of rank 3."""
    model = Net()
    replace_linear(model, ["fc"], r=3, lora_alpha=5, init_lora_weights="pissa")
    replace_linear(model, ["last"], r=3, lora_alpha=5, use_rslora=True)
    return model


def lora_ga():
    model = adapted()
    x = torch.randn(9, 8)
    lora_ga_init(model, lambda scale: (scale * model(x)).square().mean(), [1.0])
    return model


def nora():
    return adapted(layer=NoRALinear, r_inner=2)


def bda():
    return adapted(layer=BDALinear)


def pissa_bda():
    return adapted(layer=BDALinear, square=True, init_lora_weights="pissa")


KINDS = [dora, dora_rslora, pissa, pissa_rslora, pissa_dora, mixed_starts, lora_ga, nora]
KINDS += [bda, pissa_bda]


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", KINDS)
def test_peft_and_we_load_what_we_save(make, x, tmp_path):
    model = train(make())
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(Net(), tmp_path)
    # Offset bases and products of factors are rounded in float32, and so are DoRA's norms.
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    plain = Net().eval()
    assert load_adapter(plain, tmp_path) == ["fc", "last"]
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    kind = DoRALinear if isinstance(model.fc, DoRALinear) else LoRALinear
    assert type(plain.fc) is kind
    trainable = {name for name, value in plain.named_parameters() if value.requires_grad}
    assert trainable == {f"{n}.{p}" for n in ("fc", "last") for p in plain.fc.adapters()}
    # Into layers that are there already, from other values.
    train(plain)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_rank_and_scaling_of_an_offset_base(tmp_path):
    model = train(pissa())
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert config["lora_alpha"] == 10
    layer = model.fc
    lora_A = tensors["base_model.model.fc.lora_A.weight"]
    lora_B = tensors["base_model.model.fc.lora_B.weight"]
    tolerances.assert_same_bits(lora_A, torch.cat([layer.lora_A, layer.offset_A]))
    tolerances.assert_same_bits(lora_B, torch.cat([layer.lora_B, -layer.offset_B], dim=1))
    before = Net().fc.weight.double()
    after = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    change = config["lora_alpha"] / config["r"] * lora_B.double() @ lora_A.double()
    tolerances.assert_within(before + change, after, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "r": 2, "lora_dropout": 0.3},
        {"use_dora": True, "rank_pattern": {"fc": 4}, "alpha_pattern": {"last": 7}},
        {"init_lora_weights": "pissa", "r": 3},
        {"init_lora_weights": "pissa", "r": 3, "use_dora": True},
    ],
    ids=str,
)
def test_we_load_what_peft_saves(options, x, tmp_path):
    theirs = train(get_peft_model(Net(), LoraConfig(target_modules=["fc", "last"], **options)))
    theirs.save_pretrained(tmp_path)
    model = Net().eval()
    weight = model.fc.weight
    original = weight.detach().clone()
    assert set(load_adapter(model, tmp_path)) == {"fc", "last"}
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    tolerances.assert_same_bits(weight, original)
    # And on to PEFT again.
    save_adapter(model, tmp_path / "again")
    again = PeftModel.from_pretrained(Net(), tmp_path / "again")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
@pytest.mark.parametrize("make", [dora, pissa, nora])
def test_saving_merged_or_in_a_window(make, mode, tmp_path):
    model = train(make())
    save_adapter(model, tmp_path / "plain")
    with flatkern.WeightNoise(model, 0.5, mode=mode).window():
        save_adapter(model, tmp_path / "window")
    model.last.merge()
    save_adapter(model, tmp_path / "merged")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        plain = (tmp_path / "plain" / file).read_bytes()
        assert (tmp_path / "window" / file).read_bytes() == plain
        assert (tmp_path / "merged" / file).read_bytes() == plain


def test_dora_beside_others_is_refused(tmp_path):
    model = Net()
    replace_linear(model, ["fc"], layer=DoRALinear)
    replace_linear(model, ["last"])
    with pytest.raises(ValueError, match=r"DoRALinear layers only or none, got \['last'\]"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


FILES = {"lora": adapted, "dora": dora, "pissa": None}
WRONG = [
    ("lora", dora, "fc must be the saved LoRALinear, got DoRALinear"),
    ("lora", nora, "fc must be the saved LoRALinear, got NoRALinear"),
    ("lora", bda, "fc must be the saved LoRALinear, got BDALinear"),
    ("dora", adapted, "fc must be the saved DoRALinear, got LoRALinear"),
    ("lora", pissa, "fc must be over the weight that the file means"),
    ("lora", lora_ga, "fc must be over the weight that the file means"),
    ("pissa", adapted, "fc must be over the weight that the file means"),
    ("pissa", pissa, "fc must be over the weight that the file means"),
]


@pytest.mark.parametrize(("file", "make", "text"), WRONG)
def test_layers_of_another_kind_are_left_alone(file, make, text, tmp_path):
    if file == "pissa":
        config = LoraConfig(
            target_modules=["fc", "last"], r=3, lora_alpha=5, init_lora_weights="pissa"
        )
        get_peft_model(Net(), config).save_pretrained(tmp_path)
    else:
        save_adapter(train(FILES[file]()), tmp_path)
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        load_adapter(model, tmp_path)
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])


M = "base_model.model.last.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.pop(M), r"lora_magnitude_vector, not found"),
        (lambda t: t.update({M: t[M][None].clone()}), "1-D"),
        (lambda t: t.update({M: t[M][1:].clone()}), r"last\.lora_magnitude must be \[6\]"),
    ],
)
def test_wrong_magnitudes(edit, text, tmp_path):
    save_adapter(train(dora()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = Net()
    with pytest.raises(ValueError, match=text):
        load_adapter(model, tmp_path)
    assert type(model.last) is nn.Linear


def test_a_magnitude_without_use_dora(tmp_path):
    save_adapter(train(dora()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(ValueError, match=r"alone, got .*lora_magnitude_vector"):
        load_adapter(Net(), tmp_path)
