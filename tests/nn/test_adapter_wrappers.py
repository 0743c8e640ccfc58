"""Names of the unwrapped model in files, in what `replace_linear` returns, and in errors."""

import copy

import pytest
import tolerances
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from flatkern.nn import LoRALinear, load_adapter, replace_linear, save_adapter

FILE = "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    """With a block that is called `module`, which is no wrapper."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.module = Block()
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.module(self.block(x)))


def compiled(module):
    return torch.compile(module, backend="eager")


def wrap_block(wrapper):
    def wrap(model):
        model.block = wrapper(model.block)
        return model

    return wrap


def twice(model):
    model.block = compiled(checkpoint_wrapper(model.block))
    return compiled(model)


WRAPS = {
    "checkpointed block": wrap_block(checkpoint_wrapper),
    "compiled block": wrap_block(compiled),
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "several": twice,
}
EVERY_WRAP = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
NAMES = ["block.q_proj", "block.v_proj", "module.q_proj", "module.v_proj"]


def adapted():
    model = Net()
    replace_linear(model, ["q_proj", "v_proj"], r=2, modules_to_save=["head"])
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.5)
    return model


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@EVERY_WRAP
def test_the_file_does_not_depend_on_wrappers(wrap, x, tmp_path):
    model = adapted()
    expected = model(x)
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(copy.deepcopy(model)), tmp_path / "wrapped")
    for file in (FILE, "adapter_config.json"):
        plain = (tmp_path / "plain" / file).read_bytes()
        assert (tmp_path / "wrapped" / file).read_bytes() == plain
    # Into wrapped models: with layers, and without.
    other = adapted()
    for layer in other.modules():
        if isinstance(layer, LoRALinear):
            nn.init.zeros_(layer.lora_A)
    nn.init.zeros_(other.head.weight)
    for target in (wrap(other), wrap(Net())):
        assert load_adapter(target, tmp_path / "plain") == NAMES
        tolerances.assert_same_bits(target(x), expected)


@EVERY_WRAP
def test_replacing_in_a_wrapped_model(wrap, x):
    torch.manual_seed(3)
    plain = Net()
    assert replace_linear(plain, ["q_proj", "v_proj"], r=2) == NAMES
    torch.manual_seed(3)
    wrapped = wrap(Net())
    assert replace_linear(wrapped, r"(block|module)\..*_proj", r=2) == NAMES
    with torch.no_grad():
        for model in (plain, wrapped):
            for layer in model.modules():
                if isinstance(layer, LoRALinear):
                    layer.lora_B.fill_(0.1)
                    layer.lora_A.fill_(0.1)
    tolerances.assert_same_bits(wrapped(x), plain(x))
    assert sum(isinstance(layer, LoRALinear) for layer in wrapped.modules()) == 4


@EVERY_WRAP
def test_errors_name_the_unwrapped_layers(wrap):
    with pytest.raises(ValueError, match=r"layers are: block\.q_proj, block\.v_proj, module\.q"):
        replace_linear(wrap(Net()), ["x_proj"])


def test_a_target_that_is_wrapped_itself(x):
    model = Net()
    model.block.q_proj = checkpoint_wrapper(model.block.q_proj)
    assert replace_linear(model, ["q_proj"]) == ["block.q_proj", "module.q_proj"]
    model.block.q_proj._checkpoint_wrapped_module.lora_B.data.fill_(0.5)
    assert not torch.equal(model(x), Net()(x))
    model = Net()
    model.block.q_proj = compiled(model.block.q_proj)
    with pytest.raises(ValueError, match=r"block\.q_proj is compiled by itself"):
        replace_linear(model, ["q_proj"])
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())


def test_files_with_names_of_wrappers_load(x, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    renamed = {
        key.replace("base_model.model.block.", "base_model.model.block._orig_mod."): value
        for key, value in tensors.items()
    }
    save_file(renamed, tmp_path / FILE)
    again = Net()
    assert load_adapter(again, tmp_path) == NAMES
    tolerances.assert_same_bits(again(x), model(x))
    save_file(renamed | {k: v.clone() for k, v in tensors.items()}, tmp_path / FILE)
    with pytest.raises(ValueError, match="once"):
        load_adapter(Net(), tmp_path)


def test_ddp_that_came_too_early_is_named(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        with pytest.warns(UserWarning, match="wrap the model after replace_linear"):
            assert replace_linear(model, ["q_proj"]) == ["block.q_proj", "module.q_proj"]
        save_adapter(model, tmp_path / "saved")
        assert load_adapter(Net(), tmp_path / "saved") == ["block.q_proj", "module.q_proj"]
    finally:
        torch.distributed.destroy_process_group()
