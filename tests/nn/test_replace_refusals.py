"""What replace_linear refuses by name, and what it says of what it leaves out."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatkern.nn import DoRALinear, LoRALinear, NoRALinear, replace_linear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


class Experts(Net):
    """As transformers keeps them since version 5."""

    def __init__(self, count=6):
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(count, 8, 8))
        self.experts.down_proj = nn.Parameter(torch.zeros(count, 8, 8))
        self.conv = nn.Conv2d(8, 8, 3)


WRONG = [
    ({"dropout": 0.1}, "replace_linear: unknown keyword dropout; did you mean lora_dropout"),
    ({"rank": 4}, "replace_linear: unknown keyword rank; "),
    ({"r_inner": 2}, "replace_linear: unknown keyword r_inner; "),
    ({"layer": NoRALinear, "r_iner": 2}, "unknown keyword r_iner; did you mean r_inner"),
    ({"layer": DoRALinear, "re_norm": True}, "unknown keyword re_norm; did you mean renorm"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=str)
def test_unknown_keywords_name_the_public_function(options, text):
    model = Net()
    with pytest.raises(TypeError, match=text):
        replace_linear(model, ["q_proj"], **options)
    assert type(model.q_proj) is nn.Linear
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*q_proj"], ids=str)
def test_a_peft_model_is_told_of_attach(targets):
    model = get_peft_model(Net(), LoraConfig(target_modules=["q_proj"]))
    modules = list(model.modules())
    text = r"without PEFT's layers, got base_model\.model\.q_proj; .*peft\.attach\(model\)"
    with pytest.raises(TypeError, match=text):
        replace_linear(model, targets)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"], ids=str)
def test_stacked_weights_are_named(targets):
    text = r"which hold 4\d% .*: experts\.gate_up_proj, experts\.down_proj$"
    with pytest.warns(UserWarning, match=text):
        replace_linear(Experts(), targets)


def test_small_ones_and_convolutions_are_not():
    model = Net()
    model.conv = nn.Conv3d(8, 8, 3)
    model.small = nn.Parameter(torch.zeros(1, 2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(model, "all-linear")
    assert isinstance(model.q_proj, LoRALinear)
