"""LoRAParameter: PEFT's layer on the same values, files both ways, dense noise, refusals."""

import contextlib
import copy
import json
import pickle
import warnings

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import layer_kinds
from layer_kinds import KINDS, Around, inputs, prefix_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bits, same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flatkern
from flatkern.integrations._peft_attention import _times_merged
from flatkern.integrations.peft import attach
from flatkern.nn import (
    LoRALinear,
    LoRAParameter,
    load_adapter,
    lookup,
    replace_linear,
    save_adapter,
)

SIGMA = 0.3
MODES = ("virtual", "inplace")
# Those that PEFT takes as parameters: matrices and stacks.
SHARED = ["Conv1D", "table", "experts", "transposed experts", "silent experts"]


def own_model(kind, dtype=torch.float32):
    """Adapters off their starts; the plain model."""
    torch.manual_seed(0)
    make, names, _, _ = KINDS[kind]
    base = Around(make()).to(dtype)
    plain = copy.deepcopy(base)
    names = [prefix_of(kind) + name for name in names]
    replace_linear(base, [], r=2, lora_alpha=3, target_parameters=names)
    with torch.no_grad():
        for name, value in base.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    return base, plain


def adapters(model):
    """By the parameter's full name."""
    return {
        name.removesuffix("_lora"): m
        for name, m in model.named_modules()
        if isinstance(m, LoRAParameter)
    }


def run(model, x):
    result = model(*x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result.detach(), gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_shows_dense_noise_of_the_merged_weight(kind, mode, monkeypatch):
    model, plain = own_model(kind)
    twin, _ = own_model(kind)
    by_row = KINDS[kind][3]

    def deltas(kind, model):
        """s B A from the definition: outputs before inputs, then as the weight lies."""
        found = {}
        for name, adapter in adapters(model).items():
            rows = (adapter.lora_B.double() @ adapter.lora_A.double()) * 1.5
            rows = rows.reshape(-1, rows.shape[-1])
            name = name.removeprefix(prefix_of(kind))
            found[name] = layer_kinds.by_row_back(rows, adapter.weight, by_row)
        return found

    monkeypatch.setattr(layer_kinds, "deltas", deltas)
    expected = layer_kinds.dense(kind, twin, plain, SIGMA, (3, 0, 0))
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    (expected * weights).sum().backward()
    expected_gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    before = bits(model)
    noise = flatkern.WeightNoise(model, SIGMA, seed=3, mode=mode)
    with noise.window():
        result, gradients = run(model, inputs(kind))
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        if kind == "embedding" and name.endswith("lora_B"):
            # The padding token's is dropped, as in the table itself.
            expected_gradients[name][0] = 0
        if kind == "embedding" and name.endswith("lora_A"):
            continue
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_modes_agree_and_no_noise_is_the_layer(kind, dtype):
    model, plain = own_model(kind, dtype)
    x = inputs(kind, dtype)
    clean = run(model, x)
    merged = {name: a.merged_weight() for name, a in adapters(model).items()}
    assert torch.equal(torch.func.functional_call(plain, merged, tuple(x)), clean[0])
    found = {}
    for mode in MODES:
        with flatkern.WeightNoise(model, SIGMA, mode=mode).window():
            found[mode] = run(model, x)
            assert same_bits({n: a.merged_weight() for n, a in adapters(model).items()}, merged)
        with flatkern.WeightNoise(model, 0.0, mode=mode).window():
            silent = run(model, x)
        assert torch.equal(silent[0], clean[0])
        assert same_bits(silent[1], clean[1])
    assert not torch.equal(found["virtual"][0], clean[0])
    assert torch.equal(found["virtual"][0], found["inplace"][0])
    assert same_bits(found["virtual"][1], found["inplace"][1])


def peft_model(kind):
    torch.manual_seed(0)
    make, names, _, _ = KINDS[kind]
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=[], target_parameters=[f"layer.{n}" for n in names]
    )
    model = get_peft_model(Around(make()), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", SHARED)
def test_files_and_windows_are_those_of_peft(kind, tmp_path):
    model = peft_model(kind)
    x = inputs(kind)
    model.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    own = Around(KINDS[kind][0]())
    names = load_adapter(own, tmp_path / "theirs")
    assert names == [f"layer.{name}" for name in KINDS[kind][1]]
    # First: PEFT's own forward leaves the parameters in another order, and so renumbered.
    noise = attach(model, SIGMA)
    clean = model(*x)
    torch.testing.assert_close(own(*x), clean, rtol=1e-5, atol=1e-5)
    with noise.window(), flatkern.WeightNoise(own, SIGMA).window():
        noisy = model(*x)
        torch.testing.assert_close(own(*x), noisy, rtol=1e-5, atol=1e-5)
    assert not torch.equal(noisy, clean)
    # Into layers that are there, and into PEFT's.
    save_adapter(own, tmp_path / "own")
    with torch.no_grad():
        for adapter in adapters(own).values():
            adapter.lora_B.zero_()
    load_adapter(own, tmp_path / "own")
    torch.testing.assert_close(own(*x), clean, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Around(KINDS[kind][0]()), tmp_path / "own")
    torch.testing.assert_close(again(*x), clean, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(names)


def test_beside_linear_layers(tmp_path):
    """One call for both, saved in one file; a method steps on it, and a copy is its own."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.experts = nn.Linear(8, 8), layer_kinds.Experts()

        def forward(self, x, routes):
            return self.experts(self.first(x), routes)

    model = Both()
    stacks = ["gate_up_proj", "down_proj"]
    names = replace_linear(model, ["first"], r=2, target_parameters=stacks)
    assert names == ["first", "experts.gate_up_proj", "experts.down_proj"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 6
    before, x = bits(model), inputs("experts")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method = flatkern.methods.FlatLoRA(model, optimizer, sigma=SIGMA)
    for _ in range(2):
        method.step(lambda batch: model(*batch).square().mean(), [x])
    after = bits(model)
    for name in after:
        assert torch.equal(after[name], before[name]) is ("lora_" not in name), name
    save_adapter(model, tmp_path)
    other = Both()
    assert load_adapter(other, tmp_path) == names
    torch.testing.assert_close(other(*x), model(*x))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*x), model(*x))
    with torch.no_grad():
        adapters(twin)["experts.down_proj"].lora_B.add_(1)
    assert not torch.equal(twin(*x), model(*x))
    other = Both()
    replace_linear(other, ["first"], r=2, target_parameters=stacks)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*x), model(*x))


def test_methods_that_need_a_linear_layer_say_so():
    model, _ = own_model("experts")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with pytest.raises(ValueError, match=r"frozen weights outside .* linear layers"):
        flatkern.methods.ARWP(model, optimizer, strategy="fisher", scope="merged")
    groups = flatkern.nn.lora_plus_groups(model, lr=0.1, ratio=4)
    assert [group["lr"] for group in groups] == [0.1, 0.4]
    assert [len(group["params"]) for group in groups] == [2, 2]


def test_what_is_kept_for_backward():
    model, _ = own_model("experts")
    x, routes = inputs("experts")
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.requires_grad_(), routes)
    assert max(sizes) < min(a.weight.numel() for a in adapters(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_writes_the_sum_and_takes_it_out_to_the_bit(kind):
    model, plain = own_model(kind, torch.bfloat16)
    x = inputs(kind, torch.bfloat16)
    expected = {}
    for name, adapter in adapters(model).items():
        clean = adapter.weight.detach()
        rows = KINDS[kind][3](torch.arange(clean.numel()).view(clean.shape)).reshape(-1)
        delta = (adapter.lora_B.double() @ adapter.lora_A.double()).detach().reshape(-1) * 1.5
        exact = clean.double().flatten().index_add(0, rows, delta).view(clean.shape)
        expected[name] = exact
    before, saved = bits(model), copy.deepcopy(model.state_dict())
    for _ in range(2):
        for adapter in adapters(model).values():
            adapter.merge()
            adapter.merge()
        for name, adapter in adapters(model).items():
            # Products and sum in float32, then one rounding to bfloat16: half of 2^-7 relative.
            torch.testing.assert_close(
                adapter.weight.double(), expected[name], rtol=2**-8 + 1e-4, atol=1e-5
            )
        merged = {name: adapter.weight.detach() for name, adapter in adapters(model).items()}
        assert torch.equal(model(*x), torch.func.functional_call(plain, merged, tuple(x)))
        assert same_bits(dict(model.state_dict()), saved)
        for adapter in adapters(model).values():
            adapter.unmerge()
            adapter.unmerge()
        assert same_bits(bits(model), before)


@pytest.mark.parametrize("kind", SHARED)
def test_a_merged_weight_is_that_of_peft(kind, tmp_path):
    theirs = peft_model(kind)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    own = Around(KINDS[kind][0]())
    load_adapter(own, tmp_path)
    theirs.merge_adapter()
    for layer in layer_kinds.peft_layers(theirs):
        adapter = adapters(own)[f"layer.{layer.parameter_name}"]
        adapter.merge()
        expected = getattr(layer.get_base_layer(), layer.parameter_name)
        torch.testing.assert_close(adapter.weight, expected, rtol=1e-6, atol=1e-6)


def test_what_a_merged_parameter_goes_through(tmp_path):
    model, _ = own_model("attention")
    before, saved = bits(model), copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"PEFT has no place for .*out_proj\.weight, which att"):
        save_adapter(model, tmp_path)
    x = inputs("attention")
    result = model(*x)
    for adapter in adapters(model).values():
        adapter.merge()
    with pytest.raises(RuntimeError, match="that it needs was written"):
        result.sum().backward()
    assert "merged=True" in repr(model)
    merged, result = bits(model), model(*x)
    torch.testing.assert_close(result, own_model("attention")[0](*x))
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(other(*x), result)
        with pytest.raises(RuntimeError, match=r"load_state_dict into .*unmerge\(\) first"):
            other.load_state_dict({k: torch.zeros_like(v) for k, v in saved.items()})
        assert all(torch.equal(bits(other)[n], merged[n]) for n in merged if "lora" not in n)
        for adapter in adapters(other.double()).values():
            adapter.unmerge()
        assert same_bits({k: v.float() for k, v in bits(other).items() if k in before}, before)
        other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"in_proj_weight is merged; call unmerge\(\) first"):
        load_adapter(model, tmp_path)
    noise = flatkern.WeightNoise(model, SIGMA)
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        noise.open()
    for adapter in adapters(model).values():
        adapter.unmerge()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("mode", MODES)
def test_merging_and_windows(mode):
    model, _ = own_model("embedding")
    (adapter,) = adapters(model).values()
    before, x = bits(model), inputs("embedding")
    noise = flatkern.WeightNoise(model, SIGMA, mode=mode)
    with noise.window():
        noisy = model(*x)
        for action in adapter.merge, adapter.unmerge:
            with pytest.raises(RuntimeError, match=r"merge inside a noise window; use paused\(\)"):
                action()
        with noise.paused():
            adapter.merge()
            adapter.unmerge()
        assert torch.equal(model(*x), noisy)
    assert same_bits(bits(model), before)


def test_an_encoder_in_eval_mode_does_not_pass_adapters_by(tmp_path):
    """Its fast path reads the weights of its attention by itself."""

    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    model = make()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    assert replace_linear(model, [], r=2, target_parameters=names) == names
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_()
    merged = {name: adapter.merged_weight() for name, adapter in adapters(model).items()}
    with pytest.warns(UserWarning, match="PEFT has no place"):
        save_adapter(model, tmp_path)
    loaded, x = make(), layer_kinds.X[None]
    assert load_adapter(loaded, tmp_path) == names
    with torch.no_grad():
        expected = torch.func.functional_call(make().eval(), merged, (x,))
        for each in model, loaded:
            torch.testing.assert_close(each.eval()(x), expected)
            with flatkern.WeightNoise(each, SIGMA).window():
                assert not torch.allclose(each(x), expected, atol=1e-2)


def test_out_proj_is_that_of_peft_s_attention():
    """Which adds its adapter twice (see AttentionSite), so half of it is ours."""
    theirs, _ = layer_kinds.adapted("attention")
    own, _ = own_model("attention")
    for layer in layer_kinds.peft_layers(theirs):
        name = "in_proj_weight" if hasattr(layer.base_layer, "num_heads") else "out_proj.weight"
        adapter = adapters(own)[f"layer.inner.{name}"]
        with torch.no_grad():
            adapter.lora_A.copy_(layer.lora_A["default"].weight)
            times = 1 if name == "in_proj_weight" else _times_merged()
            adapter.lora_B.copy_(layer.lora_B["default"].weight * times)
    x = inputs("attention")
    torch.testing.assert_close(own(*x), theirs(*x), rtol=1e-5, atol=1e-5)
    with attach(theirs, SIGMA).window(), flatkern.WeightNoise(own, SIGMA).window():
        noisy = theirs(*x)
        torch.testing.assert_close(own(*x), noisy, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(noisy, own(*x), atol=1e-2)


@pytest.mark.parametrize("padding", [None, 0, 4])
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_is_that_of_the_dense_table(options, padding):
    """Gradients keep to the options of the table; so do those of a sparse one."""
    ids, found = KINDS["embedding"][2][0], []
    for sparse in False, True:
        torch.manual_seed(0)
        base = nn.Embedding(11, 8, padding_idx=padding, sparse=sparse, **options)
        model = nn.Sequential(base)
        replace_linear(model, [], r=2, lora_alpha=3, target_parameters=["weight"])
        (adapter,) = adapters(model).values()
        with torch.no_grad():
            adapter.lora_B.normal_()
        found.append(run(model, (ids,)))
        assert (base.padding_idx, base.sparse) == (padding, sparse)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    table = base.weight.detach() + 1.5 * B @ A
    result = nn.functional.embedding(ids, table, padding_idx=padding, **options)
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    for own, gradients in found:
        torch.testing.assert_close(own, result.detach())
        for name, expected in ("lora_A", A.grad), ("lora_B", B.grad):
            torch.testing.assert_close(gradients[f"0.weight_lora.{name}"], expected)


@pytest.mark.parametrize("noisy", [False, True])
def test_an_embedding_makes_the_rows_of_the_batch_alone(noisy, monkeypatch):
    sizes, rows = [], []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
            made = [t for t in tree_leaves(result) if is_tensor(t)]
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() not in given)
            return result

    is_tensor = torch.is_tensor
    real = lookup.ops.foreach_perturb_

    def counting(weights, *args, row_offsets, **kwargs):
        rows.extend(zip(row_offsets, map(len, weights), strict=True))
        real(weights, *args, row_offsets=row_offsets, **kwargs)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 8))
    replace_linear(model, [], r=2, target_parameters=["weight"])
    ids = torch.tensor([[3, 0, 3, 999], [9, 2, 0, 3]])
    noise = flatkern.WeightNoise(model, SIGMA)
    with noise.window() if noisy else contextlib.nullcontext():
        monkeypatch.setattr(lookup.ops, "foreach_perturb_", counting)
        with Sizes():
            model(ids)
    assert rows == ([(row, 1) for row in (0, 2, 3, 9, 999)] if noisy else [])
    assert max(sizes) <= ids.numel() * 8
    for bad in -1, 1000:
        with pytest.raises(IndexError):
            model(torch.tensor([bad]))
    with noise.window():
        assert model(ids[:0]).shape == (0, 4, 8)


@pytest.mark.parametrize("kind", ["attention", "embedding"])
def test_compiled(kind):
    model, _ = own_model(kind)
    x, noise = inputs(kind), flatkern.WeightNoise(model, SIGMA)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for window in contextlib.nullcontext, lambda: noise.window(step=0):
        with window():
            expected = run(model, x)
        with window():
            result, gradients = run(compiled, x)
        torch.testing.assert_close(result, expected[0])
        for name, gradient in expected[1].items():
            torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient)


def test_refusals():
    def refused(error, match, module, names, **options):
        model = nn.Sequential(module)
        before = bits(model)
        with pytest.raises(error, match=match):
            replace_linear(model, [], target_parameters=names, **options)
        assert same_bits(bits(model), before)
        assert not adapters(model)
        assert all(p.requires_grad for p in model.parameters())

    linear = nn.Linear(4, 4)
    refused(ValueError, "names of parameters of the model, got 'wight'", linear, ["wight"])
    refused(ValueError, "there are none", linear, ["wight"])
    experts = layer_kinds.Experts()
    refused(ValueError, r"not found; did you mean gate_up_proj\?", experts, ["gate_proj"])
    refused(ValueError, r"did you mean 0\.down_proj\?", experts, ["experts.down_proj"])
    refused(ValueError, r"there are 0\.gate_up_proj, 0\.down_proj$", experts, ["q"])
    refused(ValueError, r"got 0\.bias \[4\]", linear, ["bias"])
    refused(ValueError, "lora_dropout must be 0", linear, ["weight"], lora_dropout=0.1)
    refused(TypeError, "ConvTranspose1d", nn.ConvTranspose1d(4, 4, 3), ["weight"])
    bare = nn.MultiheadAttention(4, 2).out_proj
    refused(TypeError, "something else than nn.MultiheadAttention reads", bare, ["weight"])
    attention = nn.MultiheadAttention(4, 2)
    attention.forward = attention.forward
    refused(TypeError, "forward on the instance", attention, ["out_proj.weight"])
    refused(ValueError, "max_norm", nn.Embedding(4, 4, max_norm=1.0), ["weight"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"other modules than .*, got 0\.weight"):
        replace_linear(model, ["0"], target_parameters=["0.weight"])
    replace_linear(model, [], target_parameters=["1.weight"])
    with pytest.raises(ValueError, match=r"no adapters yet, got 1\.weight"):
        replace_linear(model, [], target_parameters=["1.weight"])
    with pytest.raises(ValueError, match=r"filters 1\.weight, for which the format"):
        save_adapter(model, "nowhere")
    assert not isinstance(model[0], LoRALinear)


def test_a_stack_without_adapters_is_still_named():
    with pytest.warns(UserWarning, match="no adapters on stacked weights"):
        replace_linear(nn.Sequential(nn.Linear(2, 2), layer_kinds.Experts()), ["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacks = ["gate_up_proj", "down_proj"]
        replace_linear(nn.Sequential(layer_kinds.Experts()), [], target_parameters=stacks)
