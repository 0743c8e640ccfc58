"""Problems and float64 expectations that the tests of noisy_linear share."""

import oracle
import tolerances
import torch
import torch.nn.functional as F

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = (2, 71, 82, 81)
OFFSETS = {"row_offset": 2**31 + 5, "col_offset": 2**32 + 3}
ARGUMENTS = ("x", "weight", "bias", "lora_A", "lora_B")


def make_key(device):
    return flatkern.NoiseKey(*KEY).to(device)


def make(m, n, lead=(3,), *, dtype=torch.float32, rank=4, adapter_dtype=None, bias=True, seed=0):
    """x, weight, bias, lora_A, lora_B on the CPU, and a scale of about a tenth of the weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    tensors = {
        "x": normal(*lead, n, dtype=dtype),
        "weight": normal(m, n, dtype=dtype) / max(n, 1) ** 0.5,
        "bias": normal(m, dtype=dtype) if bias else None,
        "lora_A": None if rank is None else normal(rank, n, dtype=adapter_dtype) / max(n, 1) ** 0.5,
        "lora_B": None if rank is None else normal(m, rank, dtype=adapter_dtype),
    }
    scale = torch.rand(m, generator=generator) * 0.2 / max(n, 1) ** 0.5
    return tensors, scale


def leaves(tensors, device, dtype=None, without=()):
    return {
        name: None
        if tensor is None
        else tensor.detach().to(device, dtype).clone().requires_grad_(name not in without)
        for name, tensor in tensors.items()
    }


def gradients(output, cotangent, tensors):
    output.backward(cotangent)
    return {
        name: tensor.grad
        for name, tensor in tensors.items()
        if tensor is not None and tensor.requires_grad
    }


def noisy_weight(weight, scale, device, elementwise=False, dtype=None, **offsets):
    z = flatkern.ops.noise(*weight.shape, make_key(device), **offsets).cpu()
    return oracle.perturbed(weight, scale, z, elementwise=elementwise, dtype=dtype)


def eager(x, weight, bias, lora_A, lora_B, scaling):
    """The composition of PEFT's LoRA layer, in the dtypes that it is given."""
    y = F.linear(x, weight, bias)
    if lora_A is None:
        return y
    adapted = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B)
    return (y + scaling * adapted).to(x.dtype)


def run_all(tensors, scale, scaling, device, *, without=(), seed=9, **options):
    """(output, gradients) of the op, of plain eager in the same dtypes, and of float64 autograd."""
    elementwise = options.get("elementwise", False)
    offsets = {name: value for name, value in options.items() if name.endswith("offset")}
    noisy = noisy_weight(tensors["weight"], scale, device, elementwise, **offsets)

    fused = leaves(tensors, device, without=without)
    y = flatkern.ops.noisy_linear(
        *fused.values(), scaling, scale.to(device), make_key(device), **options
    )
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    results = [(y, gradients(y, cotangent.to(device), fused))]

    same = leaves({**tensors, "weight": noisy}, device, without=without)
    plain = eager(*same.values(), scaling)
    results.append((plain, gradients(plain, cotangent.to(device), same)))

    exact = leaves({**tensors, "weight": noisy}, "cpu", torch.float64, without=without)
    output = oracle.lora_product(*exact.values(), scaling)
    results.append((output, gradients(output, cotangent.double(), exact)))
    return results


def check(tensors, scale, scaling, device, **options):
    fused, plain, exact = run_all(tensors, scale, scaling, device, **options)
    x = tensors["x"]
    assert fused[0].dtype == x.dtype
    assert fused[0].shape == exact[0].shape
    bound = tolerances.eager_bound(plain[0].cpu(), exact[0], x.dtype)
    tolerances.assert_within(fused[0], exact[0], bound)
    assert fused[1].keys() == exact[1].keys()
    for name, gradient in fused[1].items():
        expected = exact[1][name]
        assert gradient is not None, name
        assert gradient.dtype == tensors[name].dtype, name
        assert gradient.shape == expected.shape, name
        bound = tolerances.eager_bound(plain[1][name].cpu(), expected, gradient.dtype)
        tolerances.assert_within(gradient, expected, bound)
    return fused
