"""noisy_linear in the modes of torch: torch.func, checkpoints, determinism, memory."""

import functools

import pytest
import tolerances
import torch
from noisy_linear_cases import check, eager, leaves, make, make_key, noisy_weight
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import flatkern
from flatkern._memory import peak_bytes


def close(got, expected):
    # Products of a few dozen float32 terms of order one, summed in another order.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def problem(device):
    """(function of x and A, the same in plain eager on the noisy weight, x, A) in float32."""
    tensors, scale = make(7, 12, (4, 3))
    noisy = noisy_weight(tensors["weight"], scale, device).to(device)
    x, weight, bias, lora_A, lora_B = (tensor.to(device) for tensor in tensors.values())
    scale, key = scale.to(device), make_key(device)

    def fused(x, lora_A):
        return flatkern.ops.noisy_linear(x, weight, bias, lora_A, lora_B, 2.0, scale, key)

    def plain(x, lora_A):
        return eager(x, noisy, bias, lora_A, lora_B, 2.0)

    return fused, plain, x, lora_A


def loss(function):
    return lambda x, lora_A: function(x, lora_A).square().sum()


TRANSFORMS = {
    "grad": lambda f: grad(loss(f), argnums=(0, 1)),
    "vmap": lambda f: vmap(f, (0, None)),
    "vmap over columns": lambda f: lambda x, a: vmap(f, (1, None))(x, a),
    "gradients of each example": lambda f: vmap(grad(loss(f), argnums=1), (0, None)),
    "jacrev": lambda f: jacrev(lambda x, a: f(x[0], a).sum(0), argnums=(0, 1)),
    "adapters in a batch": lambda f: lambda x, a: vmap(f, (None, 0))(x, torch.stack([a, 2 * a])),
    "nested": lambda f: vmap(vmap(grad(loss(f), argnums=(0, 1)), (0, None)), (0, None)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_torch_func(problem, name):
    fused, plain, x, lora_A = problem
    got = TRANSFORMS[name](fused)(x, lora_A)
    expected = TRANSFORMS[name](plain)(x, lora_A)
    close(got, expected)


def test_vmap_over_keys_gives_each_example_its_own_noise(device):
    tensors, scale = make(7, 12, rank=None, bias=False)
    weight, scale, identity = tensors["weight"].to(device), scale.to(device), torch.eye(12)
    keys = torch.stack([flatkern.NoiseKey(seed).to(device) for seed in range(3)])

    def function(key):
        arguments = (identity.to(device), weight, None, None, None, 1.0, scale, key)
        return flatkern.ops.noisy_linear(*arguments)

    for got, key in zip(vmap(function)(keys), keys, strict=True):
        assert torch.equal(got.T, flatkern.ops.perturb(weight, scale, key))


@pytest.mark.parametrize(
    ("message", "transform"),
    [
        ("forward-mode derivatives", lambda f: lambda x, a: jvp(f, (x, a), (x, a))),
        ("forward-mode derivatives", lambda f: hessian(loss(f))),
        ("second derivatives", lambda f: grad(lambda x, a: grad(loss(f), 1)(x, a).sum())),
    ],
    ids=["jvp", "hessian", "grad of grad"],
)
def test_derivatives_that_are_refused(problem, message, transform):
    fused, _, x, lora_A = problem
    with pytest.raises(RuntimeError, match=f"noisy_linear: {message} are not supported"):
        transform(fused)(x, lora_A)


def test_dual_tensors_are_refused(problem):
    # Below the dispatcher a tangent would vanish without a word.
    fused, _, x, lora_A = problem
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward-mode derivatives are not supported"):
            fused(dual, lora_A)
    close(fused(x, lora_A), fused(x.clone(), lora_A))


@pytest.mark.parametrize("second", ["x", "lora_A"])
def test_second_derivatives_are_refused(problem, second):
    fused, _, x, lora_A = problem
    inputs = {"x": x, "lora_A": lora_A}
    inputs[second].requires_grad_()
    (first,) = torch.autograd.grad(loss(fused)(x, lora_A), inputs[second], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        first.sum().backward()


def test_functional_call_in_a_window():
    torch.manual_seed(0)
    model = torch.nn.Sequential(flatkern.nn.LoRALinear(12, 9), flatkern.nn.LoRALinear(9, 5))
    x, noise = torch.randn(6, 12), flatkern.WeightNoise(model, 0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    doubled = {name: (2 * p + 0.1).detach() for name, p in trained.items()}

    def function(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    with noise.window():
        got = grad(function)(doubled, x)
        each = vmap(grad(function), (None, 0))(doubled, x)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(doubled[name])
        function({}, x).backward()
    for name, parameter in trained.items():
        close(got[name], parameter.grad)
        close(each[name].sum(0), parameter.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpoints_recompute_the_same_noise(device, reentrant, autocast):
    tensors, scale = make(20, 30, (4,))
    key, scale = make_key(device), scale.to(device)
    results = []
    for checkpointed in (False, True):
        inputs = leaves(tensors, device, without=("weight",))

        def function(*arguments):
            return flatkern.ops.noisy_linear(*arguments, 2.0, scale, key).sin()

        if checkpointed:
            function = functools.partial(checkpoint, function, use_reentrant=reentrant)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = function(*inputs.values())
        y.sum().backward()
        results.append([y, *(t.grad for t in inputs.values() if t.grad is not None)])
    for got, expected in zip(*results, strict=True):
        tolerances.assert_same_bits(got, expected)


def test_strict_deterministic_mode(device):
    torch.use_deterministic_algorithms(True)
    tensors, scale = make(35, 131, (6,), adapter_dtype=torch.float32, dtype=torch.bfloat16)
    check(tensors, scale, 2.0, device, scratch_bytes=4000)


def saved_by(function):
    """(output, tensors that autograd saves) of a call."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return output, saved


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_inputs_themselves_are_saved(device, dtype, autocast):
    tensors, scale = make(24, 40, (2, 6), dtype=dtype, adapter_dtype=torch.float32)
    inputs, scale = leaves(tensors, device, without=("weight",)), scale.to(device)
    key = make_key(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        _, saved = saved_by(lambda: flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, key))
    given = {tensor.data_ptr() for tensor in (*inputs.values(), scale, key)}
    # All but the bias, which no gradient needs.
    assert len(saved) == 6
    assert {tensor.data_ptr() for tensor in saved} == given - {inputs["bias"].data_ptr()}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_saves_no_more_than_plain_lora(autocast):
    torch.manual_seed(0)
    layer = flatkern.nn.LoRALinear(64, 48, dtype=torch.float32)
    x = torch.randn(10, 64, requires_grad=True)

    def nbytes():
        kept = {layer.weight.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, saved = saved_by(lambda: layer(x))
        storages = {tensor.data_ptr(): tensor.nbytes for tensor in saved}
        return sum(size for pointer, size in storages.items() if pointer not in kept)

    plain = nbytes()
    noise = flatkern.WeightNoise(torch.nn.Sequential(layer))
    with noise.window():
        # The row scale [m] and the key take the place of x A^T [tokens, r] and of cast adapters.
        assert nbytes() <= plain + layer.out_features * 4 + 32


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_the_low_rank_part_needs_no_full_size_temporary(implementation, device, adapter_dtype):
    if not implementation.streams:
        pytest.skip(f"{implementation.name} materialises what it needs")
    if implementation.name == "triton" and device.type == "cpu":
        pytest.skip("the interpreter allocates on its own")
    tokens, m, n = 4096, 128, 256
    tensors, scale = make(m, n, (tokens,), dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    inputs = leaves(tensors, device, without=("weight", "bias"))
    scale, key = scale.to(device), make_key(device)
    scratch = 1 << 17

    def forward():
        return flatkern.ops.noisy_linear(*inputs.values(), 2.0, scale, key, scratch_bytes=scratch)

    y_bytes, x_bytes = tokens * m * 2, tokens * n * 2
    # A panel; then a block of tokens in float32, its product, and the copies of torch's own sum.
    spare = 6 * scratch
    y = forward()
    grad_y = torch.ones_like(y)
    assert peak_bytes(forward, device) < y_bytes + spare
    names = [tensor for tensor in inputs.values() if tensor.requires_grad]
    found = peak_bytes(lambda: torch.autograd.grad(y, names, grad_y, retain_graph=True), device)
    assert found < x_bytes + spare
