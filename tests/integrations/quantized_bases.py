"""Base layers that other libraries quantise, as PEFT users have them."""

import pytest
import torch
from torch import nn

TORCHAO = ("torchao-int8", "torchao-int4", "torchao-float8")
BNB = ("bnb-nf4", "bnb-nf4-nested", "bnb-fp4", "bnb-int8")
# The product of FP8Linear itself is a GPU kernel: noise alone has a forward on CPU.
FP8 = "transformers-fp8"
FORMATS = (*TORCHAO, *BNB)


def require(form):
    package = {"torchao": "torchao", "bnb": "bitsandbytes", "transformers": "transformers"}
    package = package[form.split("-")[0]]
    pytest.importorskip(package, reason=f"{package} is not installed")
    if form == FP8:
        module = pytest.importorskip("transformers.integrations.finegrained_fp8")
        if not hasattr(module, "_dequantize_fp8_weight"):
            pytest.skip("this transformers has no gradient for FP8Linear")


def quantize(model, form, names):
    """Quantise the named nn.Linear layers of a model, by the library's own means; the model."""
    require(form)
    if form in TORCHAO:
        _quantize_torchao(model, form, names)
    else:
        for name in names:
            parent, _, child = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, child, _replaced(getattr(parent, child), form))
        # What PEFT goes by; transformers sets it when it loads a quantised model.
        model.is_loaded_in_8bit = form == "bnb-int8"
        model.is_loaded_in_4bit = form.startswith("bnb-") and not model.is_loaded_in_8bit
    return model


def _quantize_torchao(model, form, names):
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    config = {
        "torchao-int8": Int8WeightOnlyConfig,
        "torchao-int4": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "torchao-float8": Float8WeightOnlyConfig,
    }[form]()
    quantize_(model, config, filter_fn=lambda module, name: name in names)


def _replaced(linear, form):
    rows, cols, has_bias = linear.out_features, linear.in_features, linear.bias is not None
    if form == FP8:
        return _fp8(linear)
    import bitsandbytes as bnb

    if form == "bnb-int8":
        layer = bnb.nn.Linear8bitLt(cols, rows, has_bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    else:
        nested = form.endswith("nested")
        kind = form.split("-")[1]
        layer = bnb.nn.Linear4bit(cols, rows, has_bias, compress_statistics=nested, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, compress_statistics=nested, quant_type=kind, module=layer
        )
    layer.bias = linear.bias
    return layer.to("cpu").requires_grad_(False)


def _fp8(linear):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    block = (32, 64)
    rows, cols = linear.weight.shape
    layer = FP8Linear(cols, rows, block, has_bias=linear.bias is not None)
    blocks = (
        linear.weight.detach().float().unfold(0, block[0], block[0]).unfold(1, block[1], block[1])
    )
    scale = blocks.abs().amax((2, 3)) / 448
    layer.weight_scale_inv.data = scale
    layer.weight.data = (linear.weight.detach().float() / _expanded(scale, block)).to(
        torch.float8_e4m3fn
    )
    layer.bias = linear.bias
    return layer.requires_grad_(False)


def _expanded(scale, block):
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def dense(layer):
    """What a quantised layer's weight means, in float64."""
    weight = layer.weight
    kind = type(layer).__name__
    if kind == "Linear4bit":
        return four_bits(weight)
    if kind == "Linear8bitLt":
        return weight.data.double() * _scales(layer).double()[:, None] / 127
    if kind == "FP8Linear":
        return weight.double() * _expanded(layer.weight_scale_inv, layer.block_size).double()
    return weight.dequantize().double()


def _scales(layer):
    """Of a Linear8bitLt, whose first forward moves them."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def four_bits(weight):
    """NF4 and FP4 by their tables: two elements a byte, the first in the upper half."""
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    packed = weight.data.view(torch.uint8).flatten().int()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    values = state.code[codes].view(-1, state.blocksize) * absmax[:, None]
    return values.view(state.shape).to(state.dtype).double()


def storages(model):
    """Copies of everything that a base model is stored as, by name, down to the bytes."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(
            module.named_buffers(recurse=False)
        )
        for key, value in own.items():
            if "lora_" in f"{name}.{key}":
                continue
            found |= {f"{name}.{key}{part}": t.clone() for part, t in _parts(value)}
        if hasattr(module, "init_8bit_state"):
            found[f"{name}.scales"] = _scales(module).clone()
    return found


def _parts(value):
    value = value.detach() if type(value) is nn.Parameter else value
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield f".{part}", getattr(value, part)
        return
    state = getattr(value, "quant_state", None)
    yield "", value.data
    if state is not None:
        yield ".absmax", state.absmax
        if state.nested:
            yield ".absmax2", state.state2.absmax
            yield ".offset", state.offset
