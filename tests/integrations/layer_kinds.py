"""PEFT over bases of every kind that takes noise, and what each computes with dense weights."""

import copy
import math
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import flatkern


class Scaled(nn.Embedding):
    """As Gemma's: the embedding times a constant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = torch.tensor(3.0)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Table(nn.Module):
    """A matrix that is read and multiplied, as routers' are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return F.linear(x, self.table)


class Experts(nn.Module):
    """As Mixtral's, [k, out, in], in a loop over the experts that get a token."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 10, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 5))

    def forward(self, x, top_k_index):
        result = torch.zeros_like(x)
        for expert in range(4):
            chosen = (top_k_index == expert).any(1).nonzero()[:, 0]
            gate, up = self.product(x[chosen], self.gate_up_proj[expert]).chunk(2, dim=-1)
            own = self.product(torch.tanh(gate) * up, self.down_proj[expert])
            result = result.index_add(0, chosen, own)
        return result

    def product(self, x, weight):
        return F.linear(x, weight)


class TransposedExperts(Experts):
    """As gpt-oss's, [k, in, out], which say so; as Llama 4's, which do not."""

    def __init__(self, says=True):
        super().__init__()
        if says:
            self.is_transposed = True
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.mT.contiguous())
        self.down_proj = nn.Parameter(self.down_proj.mT.contiguous())

    def product(self, x, weight):
        return x @ weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def outputs_first(weight):
    return weight.flatten(1) if weight.dim() != 3 else weight.reshape(-1, weight.shape[-1])


def inputs_first(weight):
    return weight.t() if weight.dim() == 2 else weight.mT.reshape(-1, weight.shape[1])


def filters(weight):
    return weight.flatten(1)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 0, 3, 5], [9, 2, 0, 3]])
# Expert 2 gets nothing.
ROUTES = torch.tensor([[0, 1], [1, 3], [0, 3], [0, 1], [3, 1]])


def image(*sizes):
    return torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(1))


# A base module; its adapted parameters; the input; its weight as [rows, n], a row for each output.
KINDS = {
    "Conv1D": (lambda: Conv1D(6, 8), ["weight"], (X,), inputs_first),
    "embedding": (lambda: nn.Embedding(11, 8, padding_idx=0), ["weight"], (IDS,), outputs_first),
    "scaled embedding": (lambda: Scaled(11, 8), ["weight"], (IDS,), outputs_first),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), ["weight"], (image(11),), filters),
    "conv2d": (lambda: nn.Conv2d(3, 6, (2, 3), padding=1), ["weight"], (image(5, 6),), filters),
    # PEFT's branch is no change of its weight.
    "groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), ["weight"], (image(5, 6),), filters),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), ["weight"], (image(3, 4, 3),), filters),
    "pixels": (lambda: nn.Conv2d(3, 6, 1), ["weight"], (image(5, 6),), filters),
    "table": (Table, ["table"], (X,), outputs_first),
    "experts": (Experts, ["gate_up_proj", "down_proj"], (X, ROUTES), outputs_first),
    "transposed experts": (
        TransposedExperts,
        ["gate_up_proj", "down_proj"],
        (X, ROUTES),
        inputs_first,
    ),
    "silent experts": (
        lambda: TransposedExperts(says=False),
        ["gate_up_proj", "down_proj"],
        (X, ROUTES),
        inputs_first,
    ),
    "attention": (Attention, ["in_proj_weight", "out_proj.weight"], (X[None],), outputs_first),
}


def prefix_of(kind):
    """Of its adapted parameters, in the model around it."""
    return "layer.inner." if kind == "attention" else "layer."


class Around(nn.Module):
    """PEFT adapts submodules."""

    def __init__(self, inner):
        super().__init__()
        self.layer = inner

    def forward(self, *args):
        return self.layer(*args)


def adapted(kind, dtype=torch.float32, **options):
    """A PEFT model over a base of this kind, off its start; the base; the parameters by name."""
    torch.manual_seed(0)
    make, names, _, _ = KINDS[kind]
    base = Around(make()).to(dtype)
    plain = copy.deepcopy(base)
    is_parameter = kind == "table" or "experts" in kind
    where = ["layer.inner"] if kind == "attention" else ["layer"]
    targets = {"target_parameters": [f"layer.{name}" for name in names], "target_modules": []}
    config = LoraConfig(
        **(targets if is_parameter else {"target_modules": where}), r=2, lora_alpha=3, **options
    )
    with warnings.catch_warnings():
        # Of Conv1D's fan_in_fan_out.
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    return model, plain


def inputs(kind, dtype=torch.float32):
    return [x.to(dtype) if x.is_floating_point() else x for x in KINDS[kind][2]]


def peft_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def deltas(kind, model):
    """s B A of each adapted parameter, in its shape, float64, differentiable in the adapters."""
    names = KINDS[kind][1]
    found = dict.fromkeys(names)
    for layer in peft_layers(model):
        name = getattr(layer, "parameter_name", None)
        if kind == "attention":
            name = names[0] if hasattr(layer.base_layer, "num_heads") else names[1]
        delta = layer.get_delta_weight("default").double()
        # PEFT 0.21 adds that of out_proj twice, outside windows as well.
        found[name or names[0]] = 2 * delta if name == "out_proj.weight" else delta
    return found


def dense(kind, model, plain, sigma, key):
    """The output with W + c z + s B A as dense float64 weights, in plain PyTorch."""
    _, names, _, by_row = KINDS[kind]
    own = deltas(kind, model)
    prefix = prefix_of(kind)
    weights = {}
    for name in names:
        weight = dict(plain.named_parameters())[prefix + name].double()
        rows = by_row((weight + own[name]).detach())
        c = sigma / math.sqrt(rows.shape[1]) * rows.norm(dim=1)
        number = [full for full, _ in plain.named_parameters()].index(prefix + name)
        matrix = weight.reshape(-1, weight.shape[-1]) if weight.dim() == 3 else weight.flatten(1)
        if kind == "conv1d":
            matrix = weight.flatten(1)  # a filter, not a stack
        key_here = flatkern.NoiseKey(*key, tensor=number).to("cpu")
        z = flatkern.ops.noise(*matrix.shape, key_here).double().view(weight.shape)
        # c along the rows, in the weight's own shape.
        scale = torch.empty_like(rows)
        scale.copy_(c[:, None].expand_as(rows))
        e = by_row_back(scale, weight, by_row) * z
        if isinstance(plain.layer, nn.Embedding) and plain.layer.padding_idx is not None:
            e[plain.layer.padding_idx] = 0
        weights[prefix + name] = _by_magnitude(model, weight.detach() + e + own[name], rows, by_row)
    twin = copy.deepcopy(plain).double()
    # It drops a gradient of A's alone in PEFT: see the test.
    twin.layer.padding_idx = None
    return torch.func.functional_call(twin, weights, tuple(inputs(kind, torch.float64)))


def _by_magnitude(model, noisy, rows, by_row):
    """DoRA's d (V + e), d = mu / ||V|| of V's columns in an embedding, else of its rows."""
    layer = peft_layers(model)[0] if peft_layers(model) else None
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    if not magnitudes:
        return noisy
    mu = magnitudes["default"].weight.double()
    columns = isinstance(layer.get_base_layer(), nn.Embedding)
    d = mu.view(1, -1) / rows.norm(dim=0) if columns else mu.view(-1, 1) / rows.norm(dim=1)[:, None]
    return by_row_back(d * by_row(noisy), noisy, by_row)


def by_row_back(rows, weight, by_row):
    """The inverse of `by_row`."""
    index = by_row(torch.arange(weight.numel()).view(weight.shape)).reshape(-1)
    return (
        torch.empty(weight.numel(), dtype=rows.dtype)
        .index_copy(0, index, rows.reshape(-1))
        .view(weight.shape)
    )
