"""Names of modules and parameters do not depend on what a module is wrapped in."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel

from flatkern.nn.names import hint, named_modules, named_parameters


def make_model():
    # A submodule called as a wrapper's attribute is: it must keep its name.
    inner = nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)})
    return nn.ModuleDict({"block": nn.ModuleDict({"0": inner}), "head": nn.Linear(2, 2)})


def wrap_twice(module):
    return torch.compile(checkpoint_wrapper(module))


WRAPPERS = [
    checkpoint_wrapper,
    offload_wrapper,
    torch.compile,
    wrap_twice,
    nn.DataParallel,
    AveragedModel,
]


@pytest.mark.parametrize("place", ["root", "block", "leaf"])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_names_are_those_of_the_unwrapped_model(wrap, place):
    model = make_model()
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    if place == "root":
        model = wrap(model)
    elif place == "block":
        model["block"] = wrap(model["block"])
    else:
        model["block"]["0"]["module"] = wrap(model["block"]["0"]["module"])
    assert [name for name, _ in named_modules(model)] == modules
    assert [name for name, _ in named_parameters(model)] == parameters
    kinds = {type(module) for _, module in named_modules(model)}
    assert kinds == {nn.ModuleDict, nn.Linear}


def test_plain_models_are_listed_as_torch_lists_them():
    model = make_model()
    model["tied"] = nn.Linear(2, 2)
    model["tied"].weight = model["head"].weight
    model["again"] = model["head"]
    for duplicates in (True, False):
        for own, theirs in (
            (named_modules, model.named_modules),
            (named_parameters, model.named_parameters),
        ):
            found = [(name, id(value)) for name, value in own(model, duplicates)]
            expected = theirs(remove_duplicate=duplicates)
            assert found == [(name, id(value)) for name, value in expected]


def test_a_name_that_is_none_gets_a_hint():
    names = [f"layers.{i}.mlp.{own}" for i in range(3) for own in ("up_proj", "down_proj")]
    assert hint("down_prj", names) == "did you mean down_proj?"
    assert hint("mlp.up", names) == "did you mean mlp.up_proj?"
    assert hint("zz", names) == "there are mlp.up_proj, mlp.down_proj"
    assert hint("zz", map(str, range(12))) == "there are 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    assert hint("zz", []) == "there are none"
