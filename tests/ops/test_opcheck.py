"""What PyTorch asks of an op: schema, fake, autograd, compilation."""

import pytest
import tolerances
import torch

import flatkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = (1, 2, 3, 4)
OFFSETS = {"row_offset": 3, "col_offset": 6}
OPS = torch.ops.flatkern


def arguments(device, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        return tensor.requires_grad_(requires_grad)

    return {
        "x": normal(2, 3, 9),
        "weight": normal(5, 9),
        "bias": normal(5),
        "lora_A": normal(2, 9, dtype=torch.float32),
        "lora_B": normal(5, 2, dtype=torch.float32),
        "row_scale": torch.full((5,), 0.1, device=device),
        "key": flatkern.NoiseKey(*KEY).to(device),
    }


def residual_cases(device, dtype):
    """Calls with a residual, where the backend has one."""
    a = arguments(device, dtype)
    weight, scale, key, adapters = a["weight"], a["row_scale"], a["key"], (a["lora_A"], a["lora_B"])
    empty, noisy = flatkern.ops.new_residual(weight), weight.clone()
    filled = empty.clone()
    flatkern.ops.perturb_(noisy, scale, key, residual=filled, **OFFSETS)
    with_empty, with_filled = {"residual": empty}, {"residual": filled, **OFFSETS}
    return [
        ("new_residual", OPS.new_residual.default, (weight,), {}),
        ("new_residual small", OPS.new_residual.default, (weight, 10), {}),
        ("check_residual", OPS.check_residual.default, (filled,), {}),
        ("perturb_ residual", OPS.perturb_.default, (weight, scale, key), with_empty),
        ("restore_ residual", OPS.restore_.default, (noisy, scale, key), with_filled),
        (
            "perturb_merged_ residual",
            OPS.perturb_merged_.default,
            (weight, *adapters, 2.0, 0.1, key),
            with_empty,
        ),
    ]


def cases(device, dtype=torch.float32):
    """(name, overload, args, kwargs) of representative calls."""
    a = arguments(device, dtype)
    weight, scale, key = a["weight"], a["row_scale"], a["key"]
    differentiable = arguments(device, dtype, requires_grad=True)
    adapters = a["lora_A"], a["lora_B"]
    out = torch.empty_like(weight)
    image = torch.ones(4, 2, 3, 3, dtype=dtype, device=device)
    image_scale = torch.ones(4, device=device)
    scales, image_scales = (one.repeat(2, 1) for one in (scale, image_scale))
    keys = torch.stack([key, key + 1])
    noisy_linear = [differentiable[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    has_residual = flatkern.ops.residual.is_available(weight)
    return [
        *(residual_cases(device, dtype) if has_residual else []),
        ("philox_bits", OPS.philox_bits.default, (5, 9, key), OFFSETS),
        ("noise", OPS.noise.default, (5, 9, key), OFFSETS),
        ("noise empty", OPS.noise.default, (0, 9, key), {}),
        ("uniform", OPS.uniform.default, (5, 9, key), OFFSETS),
        ("row_norm", OPS.row_norm.default, (weight,), {}),
        ("row_norm adapters", OPS.row_norm.default, (weight, *adapters, 2.0), {}),
        ("perturb", OPS.perturb.default, (weight, scale, key), OFFSETS),
        ("perturb grad", OPS.perturb.default, (differentiable["weight"], scale, key), {}),
        ("perturb cast", OPS.perturb.default, (weight, scale, key), {"dtype": torch.bfloat16}),
        ("perturb slice", OPS.perturb.default, (weight[:, 1:8], scale, key), {}),
        ("perturb 4-D", OPS.perturb.default, (image, image_scale, key), {}),
        ("perturb.out", OPS.perturb.out, (weight, scale, key), {"out": out}),
        ("perturb_", OPS.perturb_.default, (weight, scale, key), {"elementwise": True, **OFFSETS}),
        ("perturb_ 4-D", OPS.perturb_.default, (image, image_scale, key), {}),
        ("restore_", OPS.restore_.default, (weight, scale, key), OFFSETS),
        (
            "perturb_merged_",
            OPS.perturb_merged_.default,
            (weight, *adapters, 2.0, 0.1, key),
            {"row_offset": 3},
        ),
        (
            "perturb_merged_ plain",
            OPS.perturb_merged_.default,
            (weight, None, None, 1.0, 0.1, key),
            {},
        ),
        ("perturb_plane", OPS.perturb_plane.default, (weight, scales, keys), OFFSETS),
        ("perturb_plane 4-D", OPS.perturb_plane.default, (image, image_scales, keys), {}),
        ("perturb_plane.out", OPS.perturb_plane.out, (weight, scales, keys), {"out": out}),
        ("noisy_linear", OPS.noisy_linear.default, (*noisy_linear, 2.0, scale, key), OFFSETS),
        (
            "noisy_linear plain",
            OPS.noisy_linear.default,
            (a["x"], weight, None, None, None, 1.0, scale, key),
            {"scratch_bytes": 64},
        ),
        (
            "noisy_linear frozen",
            OPS.noisy_linear.default,
            (
                differentiable["x"],
                weight,
                None,
                differentiable["lora_A"],
                differentiable["lora_B"],
                1.0,
                scale,
                key,
            ),
            {"elementwise": True},
        ),
    ]


NAMES = [case[0] for case in cases("cpu")]


def case(name, device, dtype):
    for found, *rest in cases(device, dtype):
        if found == name:
            return rest
    pytest.skip("this backend has no residual")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    # Of one dtype, beside which adapters keep theirs; what depends on it is the next test's.
    op, args, kwargs = case(name, device, torch.bfloat16)
    torch.library.opcheck(op, args, kwargs)


def test_every_public_op_has_a_case():
    public = {name for name in flatkern.ops.__all__ if hasattr(OPS, name)}
    assert public >= {"philox_bits", "noise", "row_norm", "perturb", "perturb_", "restore_"}
    assert public >= {"perturb_merged_", "noisy_linear"}
    # Those that take lists are in test_foreach.py.
    single = {name for name in public if not name.startswith("foreach_")}
    assert single == {name.split()[0] for name in NAMES} - {"perturb.out", "perturb_plane.out"}


def signature(tensor):
    strides = tensor.stride() if tensor.numel() else None
    return tuple(tensor.shape), tensor.dtype, tensor.device.type, strides


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors_have_the_real_shapes(device, name, dtype):
    op, args, kwargs = case(name, device, dtype)
    real = op(*args, **kwargs)
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    op, args, kwargs = case(name, device, dtype)

    def fake(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode:
        result = op(*map(fake, args), **{key: fake(value) for key, value in kwargs.items()})
    if real is None:
        assert result is None
    else:
        assert signature(result) == signature(real)


def compiled_functions(a, device):
    """A function of one tensor for each op, whose results are tensors."""
    ops = flatkern.ops
    scale, key, adapters = a["row_scale"], a["key"], (a["lora_A"], a["lora_B"])

    def in_place(op):
        def function(weight):
            weight = weight * 2
            op(weight, scale, key, **OFFSETS)
            return weight + 1

        return function

    def merged(weight):
        weight = weight * 2
        c = ops.perturb_merged_(weight, *adapters, 2.0, 0.1, key)
        return weight, c

    def out(weight):
        result = torch.empty_like(weight)
        ops.perturb(weight, scale, key, out=result)
        return result * 2

    keys, scales = torch.stack([key, key + 1]), scale.repeat(2, 1)

    def plane_out(weight):
        result = torch.empty_like(weight)
        ops.perturb_plane(weight, scales, keys, out=result)
        return result * 2

    def checked(weight):
        ops.check_residual(ops.new_residual(weight))
        return weight + 1

    return {
        "new_residual": ops.new_residual,
        "check_residual": checked,
        "philox_bits": lambda w: ops.philox_bits(*w.shape, key, **OFFSETS),
        "noise": lambda w: w + ops.noise(*w.shape, key),
        "uniform": lambda w: w + ops.uniform(*w.shape, key),
        "row_norm": lambda w: ops.row_norm(w, *adapters, 2.0) * 2,
        "perturb": lambda w: ops.perturb(w, scale, key, dtype=torch.bfloat16) * 2,
        "perturb.out": out,
        "perturb_": in_place(ops.perturb_),
        "restore_": in_place(ops.restore_),
        "perturb_merged_": merged,
        "perturb_plane": lambda w: ops.perturb_plane(w, scales, keys) * 2,
        "perturb_plane.out": plane_out,
        "noisy_linear": lambda w: ops.noisy_linear(
            a["x"], w, a["bias"], *adapters, 2.0, scale, key
        ),
    }


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in NAMES}))
def test_compiled_in_one_graph(device, name):
    a = arguments(device)
    if "residual" in name:
        case(name, device, torch.float32)
    function = compiled_functions(a, device)[name]
    expected = function(a["weight"])
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(a["weight"])
    if isinstance(expected, torch.Tensor):
        expected, got = (expected,), (got,)
    for after, before in zip(got, expected, strict=True):
        tolerances.assert_same_bits(after, before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_window_with_a_residual_compiled_in_one_graph(implementation, device, merged):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    a = arguments(device, torch.bfloat16)
    original, scale, key = a["weight"].clone(), a["row_scale"], a["key"]
    adapters = a["lora_A"], a["lora_B"]

    def window(weight, residual):
        c = scale
        if merged:
            c = flatkern.ops.perturb_merged_(weight, *adapters, 2.0, 0.1, key, residual=residual)
        else:
            flatkern.ops.perturb_(weight, c, key, residual=residual)
        noisy = weight + 0
        flatkern.ops.restore_(weight, c, key, residual=residual)
        return noisy

    expected = window(original.clone(), flatkern.ops.new_residual(original))
    weight, residual = original.clone(), flatkern.ops.new_residual(original)
    before = weight._version
    compiled = torch.compile(window, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        tolerances.assert_same_bits(compiled(weight, residual), expected)
        tolerances.assert_same_bits(weight, original)
    assert weight._version > before
    assert not torch.equal(expected, original)


def test_a_compiled_check_still_checks(implementation, device):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    a = arguments(device)
    weight, residual = a["weight"], flatkern.ops.new_residual(a["weight"], 0)
    flatkern.ops.perturb_(weight, a["row_scale"], a["key"], residual=residual)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(weight):
        flatkern.ops.check_residual(residual)
        return weight + 1

    with pytest.raises(RuntimeError, match="no room"):
        function(weight)


def test_compiled_with_sizes_that_change(device):
    key = flatkern.NoiseKey(*KEY).to(device)

    def function(x, weight, scale):
        noisy = flatkern.ops.perturb(weight, scale, key)
        norm = flatkern.ops.row_norm(weight)
        y = flatkern.ops.noisy_linear(x, weight, None, None, None, 1.0, scale, key)
        return noisy, norm, y, flatkern.ops.noise(*weight.shape, key)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for m, n in ((5, 9), (8, 12), (3, 30)):
        inputs = (
            torch.ones(2, n, device=device),
            torch.ones(m, n, device=device),
            torch.ones(m, device=device),
        )
        for after, before in zip(compiled(*inputs), function(*inputs), strict=True):
            tolerances.assert_same_bits(after, before)


def test_compiled_noise_follows_the_data_of_key_and_scale(device):
    # Neither is baked into the graph: one compilation, other noise.
    weight = torch.ones(4, 16, device=device)
    compiled = torch.compile(flatkern.ops.perturb, fullgraph=True, backend="aot_eager")
    key, scale = flatkern.NoiseKey(*KEY).to(device), torch.full((4,), 0.1, device=device)
    first = compiled(weight, scale, key)
    with torch._dynamo.config.patch(error_on_recompile=True):
        key[1] += 1
        second = compiled(weight, scale, key)
        assert not torch.equal(first, second)
        tolerances.assert_same_bits(second, flatkern.ops.perturb(weight, scale, key))
        scale.zero_()
        assert torch.equal(compiled(weight, scale, key), weight)


def noisy_step(x, weight, lora_A, lora_B, scale, key):
    y = flatkern.ops.noisy_linear(x, weight, None, lora_A, lora_B, 2.0, scale, key)
    return y.square().sum()


def test_compiled_gradients(device):
    compiled = torch.compile(noisy_step, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (noisy_step, compiled):
        a = arguments(device, requires_grad=True)
        inputs = [a[name] for name in ("x", "weight", "lora_A", "lora_B")]
        function(*inputs, a["row_scale"], a["key"]).backward()
        gradients.append([tensor.grad for tensor in inputs])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_compiled_function_follows_a_change_of_backend(implementation, device):
    # Compiled under one backend and run under another, forward and backward still share the noise.
    compiled = torch.compile(
        lambda x, w, c, key: flatkern.ops.noisy_linear(x, w, None, None, None, 1.0, c, key),
        fullgraph=True,
        backend="aot_eager",
    )
    key = flatkern.NoiseKey(*KEY).to(device)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    scale = torch.full((64,), 0.1, device=device)
    identity = torch.eye(64, device=device)
    other = "auto" if implementation.name == "reference" else "reference"
    for name in (implementation.name, other, implementation.name):
        with flatkern.backend(name):
            x = identity.clone().requires_grad_()
            y = compiled(x, weight, scale, key)
            y.backward(identity)
            noisy = flatkern.ops.perturb(weight, scale, key)
        assert torch.equal(y.detach().T, noisy), name
        assert torch.equal(x.grad, noisy), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_compiled_autocast(device, compiled):
    a = arguments(device)
    arguments_ = a["x"], a["weight"], a["lora_A"], a["lora_B"], a["row_scale"], a["key"]

    def function(*inputs):
        with torch.autocast(device.type, torch.bfloat16):
            return noisy_step(*inputs)

    expected = function(*arguments_)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = function(*arguments_)
    assert got.dtype == torch.float32
    tolerances.assert_same_bits(got, expected)
    assert got != noisy_step(*arguments_)
