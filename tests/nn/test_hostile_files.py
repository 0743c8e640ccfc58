"""Adapter files that lie, are cut off or do not fit on the disk: one clear error, nothing done."""

import contextlib
import json
import pickle
import resource
import struct
import time

import pytest
import tolerances
import torch
from adapter_edits import edit_config, edit_tensors
from torch import nn

from flatkern.nn import adapter, load_adapter, replace_linear, save_adapter


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


@pytest.fixture
def folder(tmp_path):
    model = make()
    replace_linear(model, "all-linear", r=2)
    save_adapter(model, tmp_path)
    return tmp_path


def text(content):
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def weights(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def claims(length, header=b"{}", rest=b""):
    """A safetensors file that says its header has so many bytes."""
    return lambda _: struct.pack("<Q", length) + header + rest


def header(**tensors):
    data = json.dumps(tensors).encode()
    return claims(len(data), data)


A = "base_model.model.0.lora_A.weight"
HUGE = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}
SPARSE = {"dtype": "F32", "shape": [2**40, 6], "data_offsets": [0, 24 * 2**40]}
WHOLE, NAMED = "whole safetensors file", "must hold"
HOSTILE = {
    "empty weights": (weights(lambda data: b""), WHOLE),
    "cut off in the header": (weights(lambda data: data[:40]), WHOLE),
    "cut off in the data": (weights(lambda data: data[:-8]), WHOLE),
    "more than it says": (weights(lambda data: data + b"12345678"), WHOLE),
    "a header of 2^63 bytes": (weights(claims(2**63)), WHOLE),
    "a tensor of 2^64 bytes": (weights(header(x=HUGE)), WHOLE),
    "a tensor that is not there": (weights(header(**{A: SPARSE})), WHOLE),
    "a pickle": (weights(lambda data: pickle.dumps({"x": 1})), WHOLE),
    "integers": (
        edit_tensors(lambda t: t.update({A: t[A].int()})),
        "lora_A.weight must be float32",
    ),
    "a name of 1 MiB": (edit_tensors(lambda t: t.update({"x" * 2**20: t[A].clone()})), NAMED),
    "a name above the folder": (edit_tensors(lambda t: t.update({"../../x": t[A].clone()})), NAMED),
    "no object": (text("[1, 2]"), "adapter_config.json must be an object, got list"),
    "no text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{"), "must be JSON"),
    "nested without end": (text("[" * 200_000), "must be JSON"),
    "names as a string": (edit_config(modules_to_save="head"), "modules_to_save must be list"),
    "names of numbers": (edit_config(target_parameters=[1]), "target_parameters must hold names"),
    "a list of patterns": (edit_config(alpha_pattern=["fc"]), "alpha_pattern must be dict"),
    "alpha as text": (edit_config(lora_alpha="16"), "lora_alpha must be"),
    "alpha without bound": (text('{"peft_type": "LORA", "lora_alpha": 1e999}'), "lora_alpha must"),
    "a pattern that never ends": (edit_config(alpha_pattern={"(0|0)*(.*)*x": 4}), "alpha_pattern"),
    "a pattern of many powers": (edit_config(alpha_pattern={".*.*.*.*.*x": 4}), "alpha_pattern"),
    "no pattern": (edit_config(alpha_pattern={"(": 4}), "alpha_pattern must be regular"),
    "another rank": (
        edit_tensors(lambda t: t.update({A: torch.zeros(9, 6)})),
        r"lora_B must be \[5, 9\]",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, folder):
    edit, match = HOSTILE[name]
    edit(folder)
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    begin = time.thread_time()
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        load_adapter(model, folder)
    assert time.thread_time() - begin < 5
    assert len(str(caught.value)) < 1000
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        tolerances.assert_same_bits(value, state[key])


def test_what_does_not_fit_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(adapter, "read_tensors", lambda *_: pytest.fail("read"))
    edit_tensors(lambda t: t.update({A: torch.zeros(9, 6)}))(folder)
    with pytest.raises(ValueError, match="lora_B must be"):
        load_adapter(make(), folder)


@pytest.mark.parametrize("pattern", ["^0", r"model\.layers\.\d+\.(q|v)_proj", ".*attn.*proj"])
def test_usual_patterns_are_read(folder, pattern):
    edit_config(alpha_pattern={pattern: 5})(folder)
    model = make()
    load_adapter(model, folder)
    assert model[0].lora_alpha == (5 if pattern == "^0" else 16)


@contextlib.contextmanager
def full_disk(size):
    """Writes beyond so many bytes of a file fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_full_disk_leaves_the_old_files(folder, file, monkeypatch):
    """That is full in the middle of the weights, or of the settings behind them."""
    size = (folder / "adapter_model.safetensors").stat().st_size
    size += -50 if file == "adapter_model.safetensors" else 50
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = make()
    replace_linear(model, "all-linear", r=2, init_lora_weights=False)
    monkeypatch.setattr(adapter, "_config", lambda *_: {"x": "x" * 4000})
    with pytest.raises(OSError, match=r".+"), full_disk(size):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
