"""noisy_linear: layouts, scratch, what is saved, autocast and threads."""

import concurrent.futures
import contextlib
import gc
import itertools

import oracle
import pytest
import tolerances
import torch
from noisy_linear_cases import (
    ARGUMENTS,
    DTYPES,
    OFFSETS,
    check,
    eager,
    gradients,
    leaves,
    make,
    make_key,
    noisy_weight,
    run_all,
)

import flatkern


def non_contiguous(kind, x):
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if kind == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "strided", "expanded"])
def test_layouts_of_x(device, kind):
    tensors, scale = make(11, 20, (4, 6), dtype=torch.bfloat16)
    view = non_contiguous(kind, tensors["x"])
    if kind == "expanded":
        tensors["x"] = view.contiguous()
    results = []
    for x in (view, tensors["x"]):
        inputs = leaves(tensors, device, without=("x",))
        inputs["x"] = x.to(device).detach().requires_grad_()
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        # A cotangent that autograd hands over expanded, with stride 0.
        y.sum().backward()
        results.append((y, *(tensor.grad for tensor in inputs.values())))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    check(tensors, scale, 2.0, device)


def test_layouts_of_the_weight(device):
    tensors, scale = make(11, 20, (4,))
    dense = tensors["weight"]
    wide = torch.full((11, 31), float("nan"))
    wide[:, 5:25] = dense
    arguments = (None, None, None, 1.0, scale.to(device), make_key(device))
    x = tensors["x"].to(device)
    expected = flatkern.ops.noisy_linear(x, dense.to(device), *arguments)
    got = flatkern.ops.noisy_linear(x, wide.to(device)[:, 5:25], *arguments)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 4])
def test_zero_scale_is_the_plain_composition_bitwise(device, dtype, rank):
    tensors, scale = make(24, 40, (2, 5), dtype=dtype, rank=rank, adapter_dtype=torch.float32)
    fused, plain = leaves(tensors, device), leaves(tensors, device)
    y = flatkern.ops.noisy_linear(
        *fused.values(), 2.0, torch.zeros_like(scale).to(device), make_key(device)
    )
    expected = eager(*plain.values(), 2.0)
    tolerances.assert_same_bits(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_twice_gives_the_same_bits(device, dtype):
    tensors, scale = make(65, 130, (9,), dtype=dtype)
    first, _, _ = run_all(tensors, scale, 2.0, device)
    again, _, _ = run_all(tensors, scale, 2.0, device)
    tolerances.assert_same_bits(first[0], again[0])
    for name, gradient in first[1].items():
        tolerances.assert_same_bits(gradient, again[1][name])


@pytest.mark.parametrize("scratch_bytes", [1, 1500, 1 << 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_scratch(device, dtype, scratch_bytes):
    # From one row (or column) at a time to panels of which the last is shorter.
    tensors, scale = make(35, 131, (6,), dtype=dtype, adapter_dtype=torch.float32)
    check(tensors, scale, 2.0, device, scratch_bytes=scratch_bytes, **OFFSETS)


@pytest.mark.parametrize("scratch_bytes", [None, 1, 3000, 40_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_passes_use_the_same_noise(device, dtype, scratch_bytes):
    # y = x W^T and dX = dY W: with the identity on either side both show the noisy weight itself.
    tensors, scale = make(150, 150, rank=None, bias=False, dtype=dtype)
    identity = torch.eye(150, device=device, dtype=dtype)
    x = identity.clone().requires_grad_()
    weight = tensors["weight"].to(device)
    y = flatkern.ops.noisy_linear(
        *(x, weight, None, None, None, 1.0, scale.to(device), make_key(device)),
        scratch_bytes=scratch_bytes,
        **OFFSETS,
    )
    y.backward(identity)
    noisy = flatkern.ops.perturb(weight, scale.to(device), make_key(device), **OFFSETS)
    assert torch.equal(y.detach().T, noisy)
    assert torch.equal(x.grad, noisy)


@pytest.mark.parametrize("forward", ["named", "auto"])
def test_backward_uses_the_implementation_of_its_forward(implementation, device, forward):
    # Noise of two implementations differs in the last bits, so their noisy weights do.
    tensors, scale = make(64, 64, (64,), rank=None, bias=False)
    weight, scale, identity = (
        tensors["weight"].to(device),
        scale.to(device),
        torch.eye(64, device=device),
    )
    name = implementation.name if forward == "named" else "auto"
    for other in flatkern.available_backends(device.type):
        x = identity.clone().requires_grad_()
        with flatkern.backend(name):
            y = flatkern.ops.noisy_linear(x, weight, None, None, None, 1.0, scale, make_key(device))
            noisy = flatkern.ops.perturb(weight, scale, make_key(device))
        with flatkern.backend(other):
            y.backward(identity)
        assert torch.equal(x.grad, noisy), other


@contextlib.contextmanager
def new_tensors(numel):
    """What lists the tensors of at least so many elements that were made since and are alive."""
    gc.freeze()  # What is there now is not listed any more.

    def made():
        gc.collect()
        objects = gc.get_objects()
        return [x for x in objects if issubclass(type(x), torch.Tensor) and x.numel() >= numel]

    yield made


@pytest.mark.parametrize("asks", [False, True], ids=["frozen", "weight asks"])
@pytest.mark.parametrize("rank", [None, 4])
def test_nothing_of_the_weights_size_is_saved(device, rank, asks):
    m, n = 120, 110
    tensors, scale = make(m, n, (3,), rank=rank)
    inputs = leaves(tensors, device, without=() if asks else ("weight",))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with (
        new_tensors(m * n) as made,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        new = [tensor for tensor in made() if tensor.data_ptr() != inputs["weight"].data_ptr()]
    assert saved
    pointer = inputs["weight"].data_ptr()
    for tensor in saved:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        assert tensor.data_ptr() == pointer or size < m * n
    # Nor kept outside autograd's sight, on a context or in a cache.
    assert not new
    y.sum().backward()
    assert inputs["x"].grad is not None


WRITES = {
    "weight": lambda inputs, scale, key: inputs["weight"].add_(1),
    "weight by perturb_": lambda inputs, scale, key: flatkern.ops.perturb_(
        inputs["weight"], scale, key
    ),
    "weight by perturb_merged_": lambda inputs, scale, key: flatkern.ops.perturb_merged_(
        inputs["weight"], None, None, 1.0, 0.1, key
    ),
    "lora_B": lambda inputs, scale, key: inputs["lora_B"].add_(1),
    "row_scale": lambda inputs, scale, key: scale.zero_(),
    "key": lambda inputs, scale, key: key.add_(1),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_write_between_forward_and_backward_raises(device, what):
    tensors, scale = make(8, 12, (3,))
    inputs, scale, key = (
        leaves(tensors, device, without=("weight",)),
        scale.to(device),
        make_key(device),
    )
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, key)
    with torch.no_grad():
        WRITES[what](inputs, scale, key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rank", [None, 4])
def test_autocast_adds_the_noise_in_the_cast(device, rank):
    tensors, scale = make(24, 40, (6,), rank=rank)
    fused = leaves(tensors, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = flatkern.ops.noisy_linear(
            *fused.values(), 2.0, scale.to(device), make_key(device), **OFFSETS
        )
    assert y.dtype == torch.float32
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    got = gradients(y, cotangent.to(device), fused)

    noisy = noisy_weight(tensors["weight"], scale, device, dtype=torch.bfloat16, **OFFSETS)
    exact = leaves({**tensors, "weight": noisy}, "cpu", torch.float64)
    output = oracle.lora_product(*exact.values(), 2.0)
    expected = gradients(output, cotangent.double(), exact)
    same = leaves({**tensors, "weight": noisy.float()}, device)
    with torch.autocast(device.type, torch.bfloat16):
        plain = eager(*same.values(), 2.0)
    plain_gradients = gradients(plain, cotangent.to(device, plain.dtype), same)

    bound = tolerances.eager_bound(plain.cpu(), output, torch.bfloat16)
    tolerances.assert_within(y, output, bound)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        bound = tolerances.eager_bound(plain_gradients[name].cpu(), expected[name], torch.bfloat16)
        tolerances.assert_within(gradient, expected[name], bound)


def test_autocast_product_is_the_one_of_the_cast_weight(device):
    # x = identity shows the weight that the product saw: bfloat16 values, rounded once.
    tensors, scale = make(16, 16, (16,), rank=None, bias=False)
    weight, x = tensors["weight"].to(device), torch.eye(16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = flatkern.ops.noisy_linear(
            x, weight, None, None, None, 1.0, scale.to(device), make_key(device)
        )
    noisy = flatkern.ops.perturb(weight, scale.to(device), make_key(device), dtype=torch.bfloat16)
    assert torch.equal(y.T, noisy.float())
    assert not torch.equal(
        noisy.float(), flatkern.ops.perturb(weight, scale.to(device), make_key(device))
    )


def test_autocast_disabled_inside(device):
    tensors, scale = make(16, 16, (4,))
    arguments = [x.to(device) for x in tensors.values()]
    expected = flatkern.ops.noisy_linear(*arguments, 2.0, scale.to(device), make_key(device))
    with (
        torch.autocast(device.type, torch.bfloat16),
        torch.autocast(device.type, enabled=False),
    ):
        got = flatkern.ops.noisy_linear(*arguments, 2.0, scale.to(device), make_key(device))
    tolerances.assert_same_bits(got, expected)


def test_only_the_gradients_that_are_asked_for(device):
    tensors, scale = make(8, 12, (3,))
    for asked in itertools.chain.from_iterable(
        itertools.combinations(ARGUMENTS, count) for count in range(6)
    ):
        inputs = leaves(tensors, device, without=[n for n in ARGUMENTS if n not in asked])
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        assert y.requires_grad == bool(asked)
        if asked:
            y.sum().backward()
        for name, tensor in inputs.items():
            assert (tensor.grad is not None) == (name in asked), (asked, name)


def test_noise_and_scale_are_constants(device):
    tensors, scale = make(8, 12, (3,))
    scale = scale.to(device).requires_grad_()
    arguments = [x.to(device) for x in tensors.values()]
    assert not flatkern.ops.noisy_linear(*arguments, 2.0, scale, make_key(device)).requires_grad
    inputs = leaves(tensors, device)
    flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device)).sum().backward()
    assert scale.grad is None


def test_inputs_are_only_read(device):
    tensors, scale = make(8, 12, (3,))
    inputs, scale = leaves(tensors, device), scale.to(device)
    everything = [*inputs.values(), scale]
    before = [(tensor._version, tolerances.bits(tensor).clone()) for tensor in everything]
    flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device)).sum().backward()
    for tensor, (version, old) in zip(everything, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tolerances.bits(tensor), old)


def test_without_autograd(device):
    tensors, scale = make(8, 12, (3,))
    inputs, scale = leaves(tensors, device), scale.to(device)
    expected = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device))
        assert not got.requires_grad
        tolerances.assert_same_bits(got, expected)


def test_calls_from_several_threads(device):
    # Scratch belongs to the call: a shared one would mix the noise of two layers.
    tensors, scale = make(96, 96, (4,), rank=None)
    inputs, scale = leaves(tensors, device), scale.to(device)

    def run(step):
        key = flatkern.NoiseKey(1, step).to(device)
        return flatkern.ops.noisy_linear(*inputs.values(), 1.0, scale, key, scratch_bytes=5000)

    expected = [run(step) for step in range(32)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(run, range(32)), expected, strict=True):
            tolerances.assert_same_bits(got, alone)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_the_result_may_be_written(device, batch):
    tensors, scale = make(20, 30, batch)
    results = []
    for relu in (torch.relu_, torch.relu):
        inputs = leaves(tensors, device)
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        relu(y).sum().backward()
        results.append([tensor.grad for tensor in inputs.values()])
    for got, expected in zip(*results, strict=True):
        tolerances.assert_same_bits(got, expected)


def test_backward_twice_through_one_graph(device):
    tensors, scale = make(20, 30, (4,))
    inputs = leaves(tensors, device)
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
    first = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        again = torch.autograd.grad(y.sum(), list(inputs.values()))
    for got, expected in zip(again, first, strict=True):
        tolerances.assert_same_bits(got, expected)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_x_of_another_dtype_than_the_weight(device, x_dtype):
    dtype = torch.float32 if x_dtype == torch.bfloat16 else torch.bfloat16
    tensors, scale = make(20, 30, (4,), dtype=dtype, rank=3)
    tensors["x"] = tensors["x"].to(x_dtype)
    inputs = leaves(tensors, device)
    y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
    y.sum().backward()
    exact = leaves(
        {**tensors, "weight": noisy_weight(tensors["weight"], scale, device)}, "cpu", torch.float64
    )
    output = oracle.lora_product(*exact.values(), 2.0)
    output.sum().backward()
    assert y.dtype == x_dtype
    assert inputs["x"].grad.dtype == x_dtype
    # bfloat16 takes part on one side or the other: a few of its steps of the largest value.
    for got, expected in [(y, output), *((inputs[n].grad, exact[n].grad) for n in ARGUMENTS)]:
        bound = 4 * tolerances.ulp(expected.abs().max(), torch.bfloat16)
        tolerances.assert_within(got, expected, bound)
