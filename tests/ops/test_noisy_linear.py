"""noisy_linear against float64 autograd through the materialised noisy weight."""

import concurrent.futures
import gc
import itertools
import random

import oracle
import pytest
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


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 5), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(device, dtype, lead, elementwise):
    tensors, scale = make(19, 33, lead, dtype=dtype)
    if elementwise:
        scale *= 3
    check(tensors, scale, 2.0, device, elementwise=elementwise, **OFFSETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_adapters_of_another_dtype(device, dtype, adapter_dtype):
    tensors, scale = make(24, 40, (6,), dtype=dtype, rank=8, adapter_dtype=adapter_dtype)
    check(tensors, scale, 0.5, device)


@pytest.mark.parametrize(("bias", "rank"), [*itertools.product([False, True], [None, 1, 8])])
def test_without_bias_or_adapters(device, bias, rank):
    for dtype in DTYPES:
        tensors, scale = make(10, 21, (5,), dtype=dtype, rank=rank, bias=bias)
        check(tensors, scale, 2.0, device)


def test_random_problems(device):
    draw = random.Random(31)
    for trial in range(60):
        dtype = draw.choice(DTYPES)
        tensors, scale = make(
            draw.choice([1, 2, 3, 8, 31, 64]),
            draw.choice([1, 2, 5, 16, 47, 130]),
            tuple(draw.randrange(1, 5) for _ in range(draw.randrange(4))),
            dtype=dtype,
            rank=draw.choice([None, 1, 3, 16]),
            adapter_dtype=draw.choice([dtype, torch.float32]),
            bias=draw.random() < 0.5,
            seed=trial,
        )
        without = [name for name in ARGUMENTS if draw.random() < 0.3]
        if len(without) == 5 or all(tensors[n] is None for n in ARGUMENTS if n not in without):
            without = []
        check(
            tensors,
            scale,
            draw.choice([0.0, 0.5, 2.0, -1.0]),
            device,
            without=without,
            elementwise=draw.random() < 0.3,
            row_offset=draw.randrange(2**32 - 64),
            col_offset=draw.randrange(2**34 - 130),
            scratch_bytes=draw.choice([None, None, 4096, 1 << 20]),
        )


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (7, 1), (0, 5), (5, 0)])
def test_small_and_empty_weights(device, m, n):
    tensors, scale = make(m, n, (4,), rank=2)
    check(tensors, scale, 2.0, device)


def test_float64_finite_differences(device, implementation):
    tensors, scale = make(5, 6, (3,), dtype=torch.float64, rank=2)
    inputs = leaves(tensors, device)
    if not implementation.float64:
        with pytest.raises((ValueError, RuntimeError), match="float64"):
            flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
        return

    def function(*arguments):
        return flatkern.ops.noisy_linear(*arguments, 2.0, scale.to(device), make_key(device))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_float64_gradients_are_exact(device, implementation):
    if not implementation.float64:
        pytest.skip("float64 runs on the reference")
    tensors, scale = make(17, 29, (2, 5), dtype=torch.float64, rank=4)
    fused, _, exact = run_all(tensors, scale, 2.0, device)
    torch.testing.assert_close(fused[0], exact[0], rtol=1e-12, atol=1e-13)
    for name, gradient in fused[1].items():
        torch.testing.assert_close(gradient, exact[1][name], rtol=1e-12, atol=1e-12)
    # Chain rule: B^T dB = dA A^T for every loss, noisy or not.
    left = tensors["lora_B"].T @ fused[1]["lora_B"]
    right = fused[1]["lora_A"] @ tensors["lora_A"].T
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_factor_gradients_satisfy_their_identity(device):
    tensors, scale = make(64, 96, (20,), rank=8)
    (_, fused), _, _ = run_all(tensors, scale, 2.0, device)
    left = tensors["lora_B"].double().T @ fused["lora_B"].cpu().double()
    right = fused["lora_A"].cpu().double() @ tensors["lora_A"].double().T
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * left.abs().max().item())


def test_gradient_of_the_weight_is_that_of_the_noisy_product(device):
    tensors, scale = make(12, 15, (8,), rank=None, bias=False)
    weight = tensors["weight"].to(device).requires_grad_()
    x = tensors["x"].to(device)
    y = flatkern.ops.noisy_linear(
        x, weight, None, None, None, 1.0, scale.to(device), make_key(device), elementwise=True
    )
    cotangent = torch.ones_like(y)
    y.backward(cotangent)
    expected = cotangent.double().T @ x.double()
    tolerances.assert_within(
        weight.grad, expected, 8 * tolerances.ulp(expected.abs().max(), x.dtype)
    )


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


def tensors_alive(numel):
    gc.collect()
    return [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), torch.Tensor) and candidate.numel() >= numel
    ]


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

    alive = {id(tensor) for tensor in tensors_alive(m * n)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale.to(device), make_key(device))
    assert saved
    pointer = inputs["weight"].data_ptr()
    for tensor in saved:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        assert tensor.data_ptr() == pointer or size < m * n
    # Nor kept outside autograd's sight, on a context or in a cache.
    new = [t for t in tensors_alive(m * n) if id(t) not in alive and t.data_ptr() != pointer]
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


def test_forward_and_backward_do_not_keep_scratch(implementation, device):
    from flatkern._memory import peak_bytes

    if not implementation.streams:
        pytest.skip(f"{implementation.name} materialises what it needs")
    tensors, scale = make(1024, 2048, (2,), dtype=torch.bfloat16)
    inputs, scale = leaves(tensors, device, without=("weight",)), scale.to(device)

    def step():
        y = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device))
        y.sum().backward()

    step()
    # One noisy weight of 4 MiB at a time; the vectors are below 64 KiB.
    assert peak_bytes(step, device) < 1.5 * (4 << 20)

    def bounded():
        y = flatkern.ops.noisy_linear(
            *inputs.values(), 2.0, scale, make_key(device), scratch_bytes=1 << 18
        )
        y.sum().backward()

    # The product may copy a panel into its own layout.
    assert peak_bytes(bounded, device) < 1 << 20


def test_without_autograd(device):
    tensors, scale = make(8, 12, (3,))
    inputs, scale = leaves(tensors, device), scale.to(device)
    expected = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, make_key(device))
        assert not got.requires_grad
        tolerances.assert_same_bits(got, expected)


def test_checkpointing_recomputes_the_same_noise(device):
    tensors, scale = make(20, 30, (4,))
    key, scale = make_key(device), scale.to(device)
    results = []
    for checkpointed in (False, True):
        inputs = leaves(tensors, device, without=("weight",))

        def function(*arguments):
            return flatkern.ops.noisy_linear(*arguments, 2.0, scale, key).sin()

        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(function, *inputs.values(), use_reentrant=False)
        else:
            y = function(*inputs.values())
        y.sum().backward()
        results.append([y, *(t.grad for t in inputs.values() if t.grad is not None)])
    for got, expected in zip(*results, strict=True):
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
