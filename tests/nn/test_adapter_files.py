"""save_adapter and load_adapter against the real PEFT, in both directions."""

import copy

import pytest
import tolerances
import torch
from adapter_edits import edit_config, edit_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flatkern
from flatkern.nn import LoRALinear, load_adapter, replace_linear, save_adapter


class Net(nn.Module):
    """`fc` is also the suffix of `inner.fc`."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5, dtype=dtype)
        self.inner = nn.ModuleDict({"fc": nn.Linear(5, 5, dtype=dtype)})
        self.last = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.inner["fc"](torch.tanh(self.fc(x)))))


def randomise(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)


def adapted(targets="all-linear", **options):
    model = Net()
    replace_linear(model, targets, **options)
    randomise(model)
    return model


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def with_mixed_layers():
    """Ranks, alphas and rsLoRA that differ from layer to layer."""
    model = Net()
    replace_linear(model, ["inner.fc"], r=2, lora_alpha=3)
    replace_linear(model, ["last"], r=4, lora_alpha=5, use_rslora=True)
    model.fc = LoRALinear.from_linear(model.fc, r=2, lora_alpha=7)
    randomise(model)
    return model


def with_one_that_differs():
    """Its name, as a pattern, must not be taken for a suffix of another layer's."""
    model = Net()
    model.fc = LoRALinear.from_linear(model.fc, r=4, lora_alpha=7)
    replace_linear(model, ["inner.fc", "last"], r=2, lora_alpha=3)
    randomise(model)
    return model


OURS = [
    adapted,
    lambda: adapted(["fc"], r=2),
    lambda: adapted(["inner.fc", "last"], r=3, lora_alpha=4),
    lambda: adapted(r"fc|last", r=1),
    lambda: adapted(use_rslora=True, lora_alpha=5, r=3),
    lambda: adapted(lora_dropout=0.3),
    with_mixed_layers,
    with_one_that_differs,
]


@pytest.mark.parametrize("make", OURS)
def test_peft_loads_what_we_save(make, x, tmp_path):
    model = make().eval()
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(Net(), tmp_path)
    tolerances.assert_same_bits(theirs(x), model(x))
    mine = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert {name for name in mine if name in theirs.base_model.targeted_module_names} == mine
    assert len(theirs.base_model.targeted_module_names) == len(mine)


@pytest.mark.parametrize("make", OURS)
def test_we_load_what_we_save(make, x, tmp_path):
    model = make().eval()
    save_adapter(model, tmp_path / "new" / "folder")
    plain = Net().eval()
    names = load_adapter(plain, str(tmp_path / "new" / "folder"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert names == list(layers)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)
    for name, layer in layers.items():
        tolerances.assert_same_bits(plain.get_submodule(name).lora_A, layer.lora_A)
        tolerances.assert_same_bits(plain.get_submodule(name).lora_B, layer.lora_B)
    trainable = {name for name, weight in plain.named_parameters() if weight.requires_grad}
    assert trainable == {f"{name}.lora_{part}" for name in layers for part in "AB"}


THEIRS = [
    {"target_modules": ["fc", "last"]},
    {"target_modules": ["last"], "r": 2, "lora_alpha": 3, "use_rslora": True},
    {"target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_dropout": 0.2},
    {"target_modules": ["fc", "last"], "rank_pattern": {"fc": 3}, "alpha_pattern": {"^fc": 5}},
]


@pytest.mark.parametrize("options", THEIRS, ids=str)
def test_we_load_what_peft_saves(options, x, tmp_path):
    theirs = get_peft_model(Net(), LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = Net().eval()
    names = load_adapter(model, tmp_path)
    assert set(names) == set(theirs.base_model.targeted_module_names)
    tolerances.assert_same_bits(model(x), theirs(x))
    # Into layers that are there already.
    randomise(model)
    assert load_adapter(model, tmp_path) == names
    tolerances.assert_same_bits(model(x), theirs(x))


def test_a_transformer_in_bfloat16(tmp_path):
    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()

    model = base()
    replace_linear(model, ["q_proj", "down_proj"], r=4)
    randomise(model)
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight"
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for part in "AB"
    }
    ids = torch.randint(50, (2, 7))
    theirs = PeftModel.from_pretrained(base(), tmp_path)
    tolerances.assert_same_bits(theirs(ids).logits, model(ids).logits)
    again = base()
    load_adapter(again, tmp_path)
    tolerances.assert_same_bits(again(ids).logits, model(ids).logits)


def test_a_layer_used_twice(x, tmp_path):
    def base():
        net = Net()
        net.last = net.inner["fc"]
        return net

    model = base()
    assert replace_linear(model, "all-linear") == ["fc", "inner.fc", "last"]
    randomise(model)
    save_adapter(model, tmp_path)
    again = base()
    load_adapter(again, tmp_path)
    assert again.last is again.inner["fc"]
    tolerances.assert_same_bits(again(x), model(x))


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_saving_merged_or_in_a_window(mode, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "plain")
    with flatkern.WeightNoise(model, 0.5, mode=mode).window():
        save_adapter(model, tmp_path / "window")
    model.last.merge()
    save_adapter(model, tmp_path / "merged")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        plain = (tmp_path / "plain" / file).read_bytes()
        assert (tmp_path / "window" / file).read_bytes() == plain
        assert (tmp_path / "merged" / file).read_bytes() == plain


def test_saving_needs_adapters(tmp_path):
    with pytest.raises(ValueError, match="LoRALinear"):
        save_adapter(Net(), tmp_path / "new")
    with pytest.raises(TypeError, match="model"):
        save_adapter(3, tmp_path / "new")
    with pytest.raises(TypeError, match="folder"):
        save_adapter(adapted(), 3)
    assert not (tmp_path / "new").exists()


A, B = (f"base_model.model.last.lora_{part}.weight" for part in "AB")
WRONG_FILES = [
    (lambda folder: (folder / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config"),
    (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "adapter_model.safetensors",
    ),
    (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        ValueError,
        "must be JSON, got Expecting",
    ),
    (edit_config(peft_type="IA3"), ValueError, "peft_type must be LORA, got 'IA3'"),
    (edit_config(use_dora=True), ValueError, r"lora_magnitude_vector, not found"),
    (edit_config(bias="all"), ValueError, "bias"),
    (edit_config(fan_in_fan_out=True), ValueError, "fan_in_fan_out"),
    (edit_config(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights"),
    (edit_config(lora_alpha=-1), ValueError, "lora_alpha"),
    (edit_tensors(lambda t: t.pop(B)), ValueError, r"last\.lora_B\.weight, not found"),
    (edit_tensors(lambda t: t.clear()), ValueError, "must hold adapters"),
    (edit_tensors(lambda t: t.update({"x.y": t[A].clone()})), ValueError, "x.y"),
    (
        edit_tensors(lambda t: t.update({A: t[A][:, :-1].clone()})),
        ValueError,
        r"last\.lora_A must be",
    ),
    (edit_tensors(lambda t: t.update({B: t[B].flatten()})), ValueError, "2-D"),
    (
        edit_tensors(lambda t: t.update({B: t[B][:, :-1].clone()})),
        ValueError,
        r"last\.lora_B must be",
    ),
    (
        edit_tensors(lambda t: t.update({k.replace("last", "tail"): t[k].clone() for k in (A, B)})),
        ValueError,
        "tail",
    ),
]


@pytest.mark.parametrize(("edit", "error", "text"), WRONG_FILES)
@pytest.mark.parametrize("target", ["plain", "adapted"])
def test_wrong_files_change_nothing(edit, error, text, target, tmp_path):
    save_adapter(adapted(), tmp_path)
    edit(tmp_path)
    model = Net() if target == "plain" else adapted()
    state = copy.deepcopy(model.state_dict())
    flags = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(error, match=text):
        load_adapter(model, tmp_path)
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])


class Strange(Net):
    def __init__(self):
        super().__init__()
        self.last = nn.Bilinear(5, 5, 3)


def merged():
    model = adapted()
    model.last.merge()
    return model


WRONG_MODELS = [
    (Strange, TypeError, "Bilinear"),
    (lambda: adapted("fc|last"), ValueError, r"saved \['inner.fc'\] that are not one"),
    (lambda: adapted(r=4, lora_alpha=8), ValueError, r"fc\.lora_A must be \[4, 6\]"),
    (lambda: adapted(lora_alpha=8), ValueError, "scaling must be the saved 2, got 1"),
    (merged, RuntimeError, "unmerge"),
]


@pytest.mark.parametrize(("make", "error", "text"), WRONG_MODELS)
def test_models_that_do_not_fit_are_left_alone(make, error, text, tmp_path):
    save_adapter(adapted(), tmp_path)
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        load_adapter(model, tmp_path)
    for name, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[name])


def test_an_adapted_model_with_more_layers_than_the_file(tmp_path):
    save_adapter(adapted(["last"]), tmp_path)
    with pytest.raises(ValueError, match=r"LoRALinear \['fc', 'inner.fc'\] that are not saved"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_loading_in_a_window_is_refused(mode, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    noise = flatkern.WeightNoise(model, mode=mode)
    with noise.window(), pytest.raises(RuntimeError, match="window"):
        load_adapter(model, tmp_path)
