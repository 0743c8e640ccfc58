"""The C++ node against the Python that says what it does: bits, errors, what autograd is told."""

import importlib
import itertools

import pytest
import tolerances
import torch
from noisy_linear_cases import ARGUMENTS, OFFSETS, leaves, make, make_key

import flatkern

# The function of that name hides the module.
MODULE = importlib.import_module("flatkern.ops.noisy_linear")


@pytest.fixture
def in_python(implementation, monkeypatch):
    """Switches to the Python path over the same backend's panels."""
    if implementation.name not in ("cpu", "cuda"):
        pytest.skip("no C++ serves this backend")

    def switch():
        monkeypatch.setattr(MODULE, "native", lambda *arguments: None)

    return switch


def results(tensors, scale, device, asked, autocast=False, **options):
    inputs = leaves(tensors, device, without=[name for name in ARGUMENTS if name not in asked])
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = flatkern.ops.noisy_linear(
            *inputs.values(), 0.7, scale.to(device), make_key(device), **options
        )
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    return [y, *(tensor.grad for tensor in inputs.values() if tensor is not None)]


DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]


@pytest.mark.parametrize("asked", [ARGUMENTS, ("x",), ("lora_A",), ("lora_B",), ("weight", "bias")])
@pytest.mark.parametrize("scratch_bytes", [None, 5000, 900])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_are_those_of_the_python_path(in_python, device, dtypes, scratch_bytes, asked):
    dtype, adapter_dtype = dtypes
    shapes = itertools.product([(70,), (2, 3, 5)], [4, None], [False, True])
    runs = []
    for lead, rank, autocast in shapes:
        if rank is None and "lora_A" in asked and len(asked) == 1:
            continue
        if rank is None and "lora_B" in asked and len(asked) == 1:
            continue
        tensors, scale = make(35, 131, lead, dtype=dtype, adapter_dtype=adapter_dtype, rank=rank)
        options = {"autocast": autocast, "scratch_bytes": scratch_bytes, **OFFSETS}
        runs.append((tensors, scale, device, asked, options))
    got = [results(*run, **options) for *run, options in runs]
    in_python()
    for mine, (*run, options) in zip(got, runs, strict=True):
        for value, expected in zip(mine, results(*run, **options), strict=True):
            assert (value is None) == (expected is None)
            if value is not None:
                assert value.dtype == expected.dtype
                tolerances.assert_same_bits(value, expected)


BAD = {
    "x": torch.ones(4, 11),
    "weight": torch.ones(6, 12).T.contiguous().T,
    "bias": torch.ones(5),
    "lora_A": torch.ones(2, 11),
    "lora_B": None,
    "scaling": float("nan"),
    "row_scale": torch.ones(6, dtype=torch.float64),
    "key": torch.ones(3, dtype=torch.int64),
    "row_offset": -1,
    "col_offset": 2**34,
    "scratch_bytes": 0,
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_python_path(in_python, device, name):
    arguments = {
        "x": torch.ones(4, 12),
        "weight": torch.ones(6, 12),
        "bias": torch.ones(6),
        "lora_A": torch.ones(2, 12),
        "lora_B": torch.ones(6, 2),
        "scaling": 1.0,
        "row_scale": torch.ones(6),
        "key": make_key("cpu"),
        name: BAD[name],
    }
    on_device = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }

    def text():
        with pytest.raises(ValueError, match=name) as caught:
            flatkern.ops.noisy_linear(**on_device)
        return str(caught.value)

    got = text()
    in_python()
    assert got == text()


def test_it_is_one_node(in_python, device):
    tensors, scale = make(20, 30, (4,))
    inputs = leaves(tensors, device, without=("weight",))
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
    below = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None}
    assert below == {"AccumulateGrad"}


@pytest.mark.parametrize("path", ["C++", "Python"])
def test_a_late_backward_says_why(in_python, device, path):
    if path == "Python":
        in_python()
    tensors, scale = make(8, 12, (3,))
    inputs, key = leaves(tensors, device, without=("weight",)), make_key(device)
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), key)
    key.add_(0)
    with pytest.raises(RuntimeError, match="after the noise window of its forward was closed") as e:
        y.sum().backward()
    assert "modified by an inplace operation" in str(e.value)


def test_the_schema_of_the_kernels_is_traced_too(in_python, device):
    # By make_fx and fake tensors outside a compiler, which meet the node itself.
    tensors, scale = make(8, 12, (2, 3), rank=2)
    inputs = leaves(tensors, device, without=("weight",))
    op = getattr(torch.ops, f"flatkern_{device.type}").noisy_linear.default
    arguments = *inputs.values(), 2.0, scale.to(device), make_key(device)
    torch.library.opcheck(op, (*arguments, False, None, 1 << 20, 1 << 20, 3, 6))


def test_nobody_asks_and_nothing_is_kept(in_python, device):
    tensors, scale = make(8, 12, (3,))
    inputs = leaves(tensors, device, without=ARGUMENTS)
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
    assert y.grad_fn is None
