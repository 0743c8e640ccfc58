"""Rows, shared weights, tensors that are not the weight, and models that change."""

import math

import pytest
import tolerances
import torch
from noisy_models import assert_clean, clean_weights, make_model
from torch import nn

import flatkern
from flatkern.nn import replace_linear


class Weight(nn.Module):
    def __init__(self, *shape, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        vars(self).update(attributes)


class SilentExperts(Weight):
    """As Llama 4's: [k, in, out] without a word."""

    def __init__(self):
        nn.Module.__init__(self)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 7, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 7))

    weight = property(lambda self: self.gate_up_proj)


def of_transformers(name, *shape, **attributes):
    """A module of transformers' that is known by its name."""
    kind = type(name, (Weight,), {"__module__": "transformers.models.any"})
    return kind(*shape, **attributes)


def dbrx():
    kind = type(of_transformers("DbrxExpertGLU", 1))
    kind.weight = property(lambda self: self.w2)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.w2, module.moe_num_experts = nn.Parameter(torch.randn(6, 5)), 2
    return module


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 7)


# A module, and its weight as [rows, n] in which a row is an output.
KINDS = {
    "stack": (lambda: Weight(3, 5, 7), lambda w: w.reshape(15, 7)),
    "transposed stack": (
        lambda: Weight(3, 7, 5, is_transposed=True),
        lambda w: w.transpose(1, 2).reshape(15, 7),
    ),
    "silent stack": (SilentExperts, lambda w: w.transpose(1, 2).reshape(30, 7)),
    "codebooks": (
        lambda: of_transformers("CsmCodebooksHead", 3, 7, 5),
        lambda w: w.transpose(1, 2).reshape(15, 7),
    ),
    "DBRX's w2": (dbrx, lambda w: w.view(2, 3, 5).transpose(1, 2).reshape(10, 3)),
    "Conv1D": (conv1d, lambda w: w.t()),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda w: w.flatten(1)),
    "bilinear": (lambda: nn.Bilinear(4, 3, 6), lambda w: w.flatten(1)),
    "embedding": (lambda: nn.Embedding(6, 4), lambda w: w),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
        lambda w: w.view(2, 3, 4, 9).transpose(1, 2).reshape(8, 27),
    ),
}


@pytest.mark.parametrize("strategy", ["row", "flat_lora", "fisher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_an_output(kind, strategy):
    make, by_row = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    weight = model.weight
    weight.data = weight.data.double()
    clean = weight.detach().clone()
    fisher = flatkern.Fisher(eta=0.5) if strategy == "fisher" else None
    unit = flatkern.WeightNoise(model, 1.0, strategy="gaussian", scope="trainable")
    noise = flatkern.WeightNoise(model, 0.1, strategy=strategy, scope="trainable", fisher=fisher)
    squares = torch.ones(len(by_row(clean)))
    if fisher is not None:
        squares = noise.row_squares(noise.names[0], clean)
        torch.testing.assert_close(squares, by_row(clean).square().sum(1))
        fisher.observe({noise.names[0]: squares})
    with unit.window():
        z = by_row(weight.detach() - clean)
    with noise.window():
        e = by_row(weight.detach() - clean)
    c = 0.1 * by_row(clean).norm(dim=1)
    c = c / math.sqrt(z.shape[1]) if strategy == "flat_lora" else c
    c = c / (1 + 0.5 * squares).sqrt() if fisher is not None else c
    torch.testing.assert_close(e, c[:, None] * z, rtol=1e-5, atol=1e-7)
    tolerances.assert_same_bits(weight.detach(), clean)


def test_the_layout_of_experts_is_told_by_their_shapes():
    from flatkern.noise.rows import is_transposed

    module = Weight(1)
    for up, down, transposed in (
        ((3, 10, 7), (3, 7, 5), False),
        ((3, 7, 10), (3, 5, 7), True),
        # As wide as it is long: down_proj alone tells.
        ((3, 10, 10), (3, 10, 5), False),
        ((3, 10, 10), (3, 5, 10), True),
    ):
        module.gate_up_proj = nn.Parameter(torch.empty(up))
        module.down_proj = nn.Parameter(torch.empty(down))
        for name in ("gate_up_proj", "down_proj"):
            assert is_transposed(module, name) is transposed
        assert not is_transposed(module, "weight")
        module.is_transposed = not transposed
        assert is_transposed(module, "down_proj") is not transposed
        del module.is_transposed


def test_a_row_for_padding_takes_no_noise():
    model = nn.Embedding(5, 4, padding_idx=-2)
    nn.init.normal_(model.weight)
    clean = model.weight.detach().clone()
    for strategy in ("gaussian", "element", "flat_lora"):
        with flatkern.WeightNoise(model, 0.5, strategy=strategy, scope="trainable").window():
            moved = (model.weight != clean).any(1)
        assert moved.tolist() == [True, True, True, False, True]
    tolerances.assert_same_bits(model.weight.detach(), clean)


def test_an_embedding_that_writes_its_weight_is_named():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"no noise on 0\.weight \(an embedding with max_norm"):
        noise = flatkern.WeightNoise(model, scope="trainable")
    assert noise.names == ["1.weight", "1.bias"]
    with noise.window():
        model(torch.arange(5))


def test_tied_weights():
    """Virtual noise is for the layer that adds it; in place every reader sees it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    model["embed"].weight = model["head"].weight
    replace_linear(model, ["head"])
    ids = torch.arange(8)
    clean = model["embed"](ids)
    for mode, seen in (("virtual", False), ("auto", False), ("inplace", True)):
        with flatkern.WeightNoise(model, 0.3, mode=mode).window(micro_batches=8):
            assert torch.equal(model["embed"](ids), clean) is not seen
            assert not torch.equal(model["head"](torch.eye(8)).t(), clean)
        assert torch.equal(model["embed"](ids), clean)


def shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    replace_linear(model, "all-linear", init_lora_weights=False)
    return model


def test_layers_over_one_weight_have_a_scale_each():
    model = shared()
    before = clean_weights(model)
    for options in ({}, {"mode": "auto"}):
        noise = flatkern.WeightNoise(model, 0.1, **options)
        assert noise.names == ["0.weight"]
        assert "1 weights, 64 elements" in noise.summary()
        with noise.window(micro_batches=8):
            for layer in model:
                c = 0.1 / 8**0.5 * layer.merged_weight().norm(dim=1)
                torch.testing.assert_close(layer._window.row_scale, c)
        assert_clean(model, before)
    with pytest.raises(ValueError, match=r"mode must be 'virtual'.*share a weight, as 0\.weight"):
        flatkern.WeightNoise(model, mode="inplace")
    with flatkern.WeightNoise(model, mode="inplace", strategy="gaussian").window():
        pass
    assert_clean(model, before)


def partition(weight):
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)


def flatten(weight):
    weight._fsdp_flattened = True


def offload(weight):
    weight.data = weight.data.to("meta")


def free(weight):
    weight.data.untyped_storage().resize_(0)


@pytest.mark.parametrize("scope", ["merged", "origin", "full", "all"])
@pytest.mark.parametrize("spoil", [partition, flatten, offload, free])
def test_what_is_no_whole_weight_is_refused_by_name(spoil, scope):
    for early in (True, False):
        model = make_model()
        noise = None if early else flatkern.WeightNoise(model, scope=scope)
        if spoil is offload:
            model[3].weight = nn.Parameter(model[3].weight.to("meta"), requires_grad=False)
        else:
            spoil(model[3].weight)
        with pytest.raises(ValueError, match=r"3\.weight must be held whole"):
            noise.open() if noise else flatkern.WeightNoise(model, scope=scope)
        assert noise is None or not noise.active


def test_lazy_parameters_are_refused_and_empty_ones_harmless():
    with pytest.raises(ValueError, match=r"weight must be held whole.*one forward"):
        flatkern.WeightNoise(nn.LazyLinear(3), scope="trainable")
    model = Weight(0, 4)
    with flatkern.WeightNoise(model, scope="trainable").window():
        pass


def test_complex_weights_are_named():
    model = make_model()
    model.spectrum = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    for scope in ("origin", "all", "trainable", "full"):
        with pytest.warns(UserWarning, match=r"no noise on spectrum \(complex64\)"):
            noise = flatkern.WeightNoise(model, scope=scope)
        assert "spectrum (complex64)" in noise.summary().splitlines()[-1]


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_merging_in_a_pause(mode):
    model = make_model()
    before, merged = clean_weights(model), model[1].merged_weight()
    noise = flatkern.WeightNoise(model, 0.3, mode=mode)
    x = torch.randn(2, 12)
    with noise.window():
        noisy = model(x)
        with pytest.raises(RuntimeError, match=r"paused\(\)"):
            model[1].merge()
        with noise.paused():
            model[1].merge()
            tolerances.assert_same_bits(model[1].weight.detach(), merged)
            tolerances.assert_same_bits(model[1].merged_weight(), merged)
            model[1].unmerge()
        tolerances.assert_same_bits(model(x), noisy)
    message = r"1\.weight must be unmerged"
    with pytest.raises(RuntimeError, match=message), noise.window(), noise.paused():
        model[1].merge()
    assert not noise.active
    model[1].unmerge()
    assert_clean(model, before)


def test_models_that_change():
    model = make_model()
    noise = flatkern.WeightNoise(model, 0.3, scope="trainable")
    model[4].lora_A.requires_grad_(False)
    with noise.window():
        assert "4.lora_A" not in noise.names
    model[4].lora_A.requires_grad_(True)
    with noise.window():
        assert "4.lora_A" in noise.names
    noise = flatkern.WeightNoise(model, 0.3)
    model[3].weight = nn.Parameter(model[3].weight.detach().to(torch.complex64))
    with pytest.raises(RuntimeError, match=r"3\.weight became complex64"):
        noise.open()
    model[3] = nn.Linear(16, 9)
    with pytest.raises(RuntimeError, match=r"3\.weight had noise and cannot take it"):
        noise.open()
    assert not noise.active


def test_noise_does_not_depend_on_wrapping():
    x = torch.randn(2, 12)
    model = make_model()
    plain = flatkern.WeightNoise(model, 0.3)
    with plain.window():
        expected = model(x)
    wrapped = nn.Sequential(*model)
    wrapped[3] = torch.compile(wrapped[3], backend="eager")
    noise = flatkern.WeightNoise(wrapped, 0.3)
    assert (noise.names, noise.summary()) == (plain.names, plain.summary())
    with noise.window():
        tolerances.assert_same_bits(wrapped(x), expected)


def test_adapters_of_peft_are_known_without_attach():
    peft = pytest.importorskip("peft")
    from flatkern.integrations.peft import attach

    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    configs = [
        peft.LoraConfig(target_modules=["0"], use_dora=True, modules_to_save=["2"]),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["0"]),
    ]
    for config in configs:
        model = peft.get_peft_model(nn.Sequential(*base), config)
        names = flatkern.WeightNoise(model, scope="origin").names
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        assert sorted(names) == sorted(frozen)
    model = peft.get_peft_model(nn.Sequential(*base), configs[0])
    before = flatkern.WeightNoise(model, scope="full").summary()
    after = attach(model, scope="full").summary()
    assert [line.split()[:-1] for line in before.splitlines()] == [
        line.split()[:-1] for line in after.splitlines()
    ]


def test_schedules_by_name():
    noise = flatkern.WeightNoise(make_model(), 0.3, schedule="constant")
    assert noise.sigma_t == 0.3
    with pytest.raises(TypeError, match=r"flatkern\.linear_ramp\(total_steps\)"):
        flatkern.WeightNoise(make_model(), schedule="linear_ramp")
