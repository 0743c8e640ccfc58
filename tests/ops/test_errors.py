"""Bad input: the right exception, a message that names the argument, and nothing written."""

import re

import pytest
import tolerances
import torch

import flatkern

NAN, INF = float("nan"), float("inf")
BEYOND = 2**40


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def good(device):
    return {
        "x": torch.ones(4, 12, device=device),
        "weight": torch.ones(6, 12, device=device),
        "bias": torch.ones(6, device=device),
        "lora_A": torch.ones(2, 12, device=device),
        "lora_B": torch.ones(6, 2, device=device),
        "scaling": 2.0,
        "sigma": 0.1,
        "row_scale": torch.ones(6, device=device),
        "key": flatkern.NoiseKey(1, 2, 3, 4).to(device),
        "rows": 6,
        "cols": 12,
        "row_offset": 0,
        "col_offset": 0,
        "elementwise": False,
        "residual": None,
        "out": torch.ones(6, 12, device=device),
        "dtype": None,
        "scratch_bytes": None,
    }


ACCEPTS = {
    "philox_bits": ("rows", "cols", "key", "row_offset", "col_offset"),
    "noise": ("rows", "cols", "key", "row_offset", "col_offset"),
    "uniform": ("rows", "cols", "key", "row_offset", "col_offset"),
    "row_norm": ("weight", "lora_A", "lora_B", "scaling"),
    "perturb": ("weight", "row_scale", "key", "elementwise", "dtype", "row_offset", "col_offset"),
    "perturb.out": ("weight", "row_scale", "key", "elementwise", "out", "row_offset", "col_offset"),
    "perturb_": (
        *("weight", "row_scale", "key", "elementwise", "residual", "row_offset", "col_offset"),
    ),
    "restore_": (
        *("weight", "row_scale", "key", "elementwise", "residual", "row_offset", "col_offset"),
    ),
    "perturb_merged_": (
        *("weight", "lora_A", "lora_B", "scaling", "sigma", "key", "elementwise", "residual"),
        "row_offset",
    ),
    "noisy_linear": (
        *("x", "weight", "bias", "lora_A", "lora_B", "scaling", "row_scale", "key"),
        *("elementwise", "scratch_bytes", "row_offset", "col_offset"),
    ),
}
POSITIONAL = {
    "philox_bits": 3,
    "noise": 3,
    "uniform": 3,
    "row_norm": 4,
    "perturb": 3,
    "perturb.out": 3,
    "perturb_": 3,
    "restore_": 3,
    "perturb_merged_": 6,
    "noisy_linear": 8,
}
TAKES = {
    argument: [op for op, names in ACCEPTS.items() if argument in names] for argument in good("cpu")
}
TAKES_WEIGHT = TAKES["weight"]

# (argument, what it was as the message must show it, the bad value). Wrong kinds:
KINDS = [
    ("weight", "list", [[1.0]]),
    ("weight", "NoneType", None),
    ("row_scale", "float", 0.1),
    ("row_scale", "NoneType", None),
    ("key", "NoiseKey", flatkern.NoiseKey(1)),
    ("key", "int", 3),
    ("key", "NoneType", None),
    ("rows", "float", 6.0),
    ("cols", "str", "12"),
    ("rows", "NoneType", None),
    ("row_offset", "float", 1.0),
    ("col_offset", "NoneType", None),
    ("elementwise", "str", "yes"),
    ("elementwise", "NoneType", None),
    ("scaling", "str", "2"),
    ("scaling", "NoneType", None),
    ("sigma", "str", "0.1"),
    ("sigma", "NoneType", None),
    ("lora_A", "list", [1.0]),
    ("lora_B", "float", 1.0),
    ("residual", "str", "exact"),
    ("out", "list", [1.0]),
    ("dtype", "str", "bfloat16"),
    ("bias", "float", 0.5),
    ("x", "list", [1.0]),
    ("x", "NoneType", None),
    ("scratch_bytes", "str", "1MiB"),
    ("scratch_bytes", "float", 1e6),
]

# Wrong values. A function makes the value on the device of the good arguments.
VALUES = [
    ("weight", "int32", lambda d: tensor(6, 12, dtype=torch.int32, device=d)),
    ("weight", "float8", lambda d: tensor(6, 12, dtype=torch.float8_e4m3fn, device=d)),
    ("weight", "complex64", lambda d: tensor(6, 12, dtype=torch.complex64, device=d)),
    ("weight", "[]", lambda d: tensor(device=d)),
    ("weight", "strides [1, 6]", lambda d: tensor(12, 6, device=d).T),
    ("weight", "strides [24, 2]", lambda d: tensor(6, 24, device=d)[:, ::2]),
    ("row_scale", "[5]", lambda d: tensor(5, device=d)),
    ("row_scale", "[6, 1]", lambda d: tensor(6, 1, device=d)),
    ("row_scale", "[]", lambda d: tensor(device=d)),
    ("row_scale", "float64", lambda d: tensor(6, dtype=torch.float64, device=d)),
    ("row_scale", "bfloat16", lambda d: tensor(6, dtype=torch.bfloat16, device=d)),
    ("row_scale", "meta", lambda d: tensor(6, device="meta")),
    ("key", "[3]", lambda d: tensor(3, dtype=torch.int64, device=d)),
    ("key", "[1, 4]", lambda d: tensor(1, 4, dtype=torch.int64, device=d)),
    ("key", "int32", lambda d: tensor(4, dtype=torch.int32, device=d)),
    ("key", "float32", lambda d: tensor(4, device=d)),
    ("rows", "-1", -1),
    ("cols", "-4", -4),
    ("rows", str(BEYOND), BEYOND),
    ("cols", str(BEYOND), BEYOND),
    ("row_offset", "-1", -1),
    ("col_offset", "-4", -4),
    ("row_offset", str(2**32), 2**32),
    ("row_offset", str(2**32 - 5), 2**32 - 5),
    ("col_offset", str(2**34 - 11), 2**34 - 11),
    ("lora_A", "[2, 11]", lambda d: tensor(2, 11, device=d)),
    ("lora_A", "[12]", lambda d: tensor(12, device=d)),
    ("lora_A", "int64", lambda d: tensor(2, 12, dtype=torch.int64, device=d)),
    ("lora_A", "None", None),
    ("lora_A", "meta", lambda d: tensor(2, 12, device="meta")),
    ("lora_B", "[5, 2]", lambda d: tensor(5, 2, device=d)),
    ("lora_B", "[6, 3]", lambda d: tensor(6, 3, device=d)),
    ("lora_B", "bool", lambda d: tensor(6, 2, dtype=torch.bool, device=d)),
    ("lora_B", "None", None),
    ("scaling", "nan", NAN),
    ("scaling", "inf", INF),
    ("sigma", "nan", NAN),
    ("sigma", "inf", INF),
    ("sigma", "-inf", -INF),
    ("out", "[6, 11]", lambda d: tensor(6, 11, device=d)),
    ("out", "[12, 6]", lambda d: tensor(12, 6, device=d)),
    ("out", "int32", lambda d: tensor(6, 12, dtype=torch.int32, device=d)),
    ("out", "float64", lambda d: tensor(6, 12, dtype=torch.float64, device=d)),
    ("out", "meta", lambda d: tensor(6, 12, device="meta")),
    ("out", "strides [1, 6]", lambda d: tensor(12, 6, device=d).T),
    ("out", "strides [0, 1]", lambda d: tensor(1, 12, device=d).expand(6, 12)),
    ("dtype", "int32", torch.int32),
    ("dtype", "float64", torch.float64),
    ("x", "[4, 11]", lambda d: tensor(4, 11, device=d)),
    ("x", "[]", lambda d: tensor(device=d)),
    ("x", "int64", lambda d: tensor(4, 12, dtype=torch.int64, device=d)),
    ("x", "meta", lambda d: tensor(4, 12, device="meta")),
    ("bias", "[5]", lambda d: tensor(5, device=d)),
    ("bias", "[1, 6]", lambda d: tensor(1, 6, device=d)),
    ("bias", "int64", lambda d: tensor(6, dtype=torch.int64, device=d)),
    ("scratch_bytes", "0", 0),
    ("scratch_bytes", "-8", -8),
]


def expand(table):
    """One test case for each op that takes the argument."""
    return [
        pytest.param(op, argument, was, value, id=f"{op}-{argument}-{was}")
        for argument, was, value in table
        for op in TAKES[argument]
        if not (argument == "weight" and was == "[]" and op == "noisy_linear")
    ]


def arguments_of(op, device, **changed):
    values = {**good(device), **changed}
    names = ACCEPTS[op]
    split = POSITIONAL[op]
    return [values[name] for name in names[:split]], {name: values[name] for name in names[split:]}


def public(op):
    return getattr(flatkern.ops, op.removesuffix(".out"))


def registered(op):
    packet = getattr(torch.ops.flatkern, op.removesuffix(".out"))
    return packet.out if op.endswith(".out") else packet.default


def refused(function, args, kwargs, error):
    """Call, expect `error`, hold that nothing was written; return the message."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    real = [value for value in tensors if value.device.type != "meta"]
    before = [(value.clone(), value._version) for value in real]
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    for value, (old, version) in zip(real, before, strict=True):
        assert value._version == version
        if value.dtype.is_floating_point and value.element_size() > 1:
            tolerances.assert_same_bits(value, old)
    return str(caught.value)


def assert_helpful(message, op, argument, was):
    assert op.removesuffix(".out") in message
    assert re.search(rf"\b{argument}\b", message), message
    assert was in message, message
    assert len(message) > len(argument) + len(was) + 10, message


@pytest.mark.parametrize(("op", "argument", "was", "value"), expand(KINDS))
def test_wrong_kind(device, op, argument, was, value):
    args, kwargs = arguments_of(op, device, **{argument: value})
    if value is None and argument in ("weight", "key", "row_scale", "x") and op == "perturb.out":
        kwargs.pop("dtype", None)
    message = refused(public(op), args, kwargs, TypeError)
    assert_helpful(message, op, argument, was)


@pytest.mark.parametrize(("op", "argument", "was", "value"), expand(VALUES))
def test_wrong_value(device, op, argument, was, value):
    value = value(device) if callable(value) else value
    for function in (public(op), registered(op)):
        args, kwargs = arguments_of(op, device, **{argument: value})
        message = refused(function, args, kwargs, ValueError)
        assert_helpful(message, op, argument, was)


@pytest.mark.parametrize("op", TAKES["key"])
def test_key_on_another_device(device, op):
    if "weight" not in ACCEPTS[op]:
        pytest.skip("the key says where the noise goes")
    key = tensor(4, dtype=torch.int64, device="meta")
    for function in (public(op), registered(op)):
        args, kwargs = arguments_of(op, device, key=key)
        message = refused(function, args, kwargs, ValueError)
        assert_helpful(message, op, "key", "meta")


@pytest.mark.parametrize("op", ["perturb_", "restore_", "perturb_merged_"])
def test_rows_that_overlap_cannot_be_written(device, op):
    storage = torch.ones(40, device=device)
    for weight in (
        torch.ones(1, 12, device=device).expand(6, 12),
        storage.as_strided((6, 12), (5, 1)),
    ):
        for function in (public(op), registered(op)):
            args, kwargs = arguments_of(op, device, weight=weight)
            message = refused(function, args, kwargs, ValueError)
            assert_helpful(message, op, "weight", "stride")
    assert (storage == 1).all()


@pytest.mark.parametrize("op", [op for op in TAKES_WEIGHT if op != "noisy_linear"])
def test_other_shapes_must_be_contiguous(device, op):
    image = torch.ones(6, 2, 3, 2, device=device).to(memory_format=torch.channels_last)
    out = torch.ones_like(image, memory_format=torch.contiguous_format)
    for function in (public(op), registered(op)):
        args, kwargs = arguments_of(op, device, weight=image, out=out)
        message = refused(function, args, kwargs, ValueError)
        assert_helpful(message, op, "weight", "contiguous")


def test_dtype_and_out_that_disagree(device):
    args, kwargs = arguments_of("perturb.out", device)
    kwargs["dtype"] = torch.bfloat16
    message = refused(flatkern.ops.perturb, args, kwargs, ValueError)
    assert_helpful(message, "perturb", "dtype", "bfloat16")


@pytest.mark.parametrize("op", TAKES["residual"])
def test_what_is_not_a_residual_is_refused(device, op):
    residual = torch.ones(6, 12, device=device)
    args, kwargs = arguments_of(op, device, residual=residual)
    message = refused(public(op), args, kwargs, ValueError)
    assert_helpful(message, op, "residual", "[6, 12]")


@pytest.mark.parametrize("op", TAKES_WEIGHT)
def test_sparse_and_subclassed_layouts_are_refused(device, op):
    sparse = torch.ones(6, 12, device=device).to_sparse()
    args, kwargs = arguments_of(op, device, weight=sparse)
    with pytest.raises((ValueError, NotImplementedError), match=r"weight|sparse|Sparse"):
        public(op)(*args, **kwargs)


@pytest.mark.parametrize("op", sorted(ACCEPTS))
def test_good_arguments_are_accepted(device, op):
    for function in (public(op), registered(op)):
        args, kwargs = arguments_of(op, device)
        if op == "perturb.out" and function is public(op):
            kwargs["dtype"] = torch.float32
        function(*args, **kwargs)


@pytest.mark.parametrize("op", sorted(ACCEPTS))
def test_names_and_order_of_the_arguments(op):
    import inspect

    parameters = inspect.signature(public(op)).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    names = ACCEPTS[op]
    assert tuple(positional) == names[: POSITIONAL[op]]
    extra = {"dtype"} if op == "perturb.out" else {"out"} if op == "perturb" else set()
    assert keyword_only == set(names[POSITIONAL[op] :]) | extra


def test_fake_tensors_are_checked_alike(device):
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        weight, scale = torch.ones(6, 12), torch.ones(5)
        key = torch.ones(4, dtype=torch.int64)
        with pytest.raises(ValueError, match="row_scale"):
            torch.ops.flatkern.perturb_(weight, scale, key)
        with pytest.raises(ValueError, match="lora_B"):
            torch.ops.flatkern.row_norm(weight, torch.ones(2, 12), torch.ones(5, 2))
        with pytest.raises(ValueError, match="x"):
            torch.ops.flatkern.noisy_linear(
                torch.ones(4, 11), weight, None, None, None, 1.0, torch.ones(6), key
            )


@pytest.mark.parametrize("word", ["seed", "step", "draw", "tensor"])
@pytest.mark.parametrize("value", [-1, 2**32, 2**64])
def test_noise_key_range(word, value):
    with pytest.raises(ValueError, match=rf"{word}.*{value}"):
        flatkern.NoiseKey(**{"seed": 0, word: value})


@pytest.mark.parametrize("value", [1.0, "1", None, True, torch.tensor(1)])
def test_noise_key_kind(value):
    with pytest.raises(TypeError, match="seed"):
        flatkern.NoiseKey(value)


def test_noise_key_makes_the_tensor_of_the_ops():
    key = flatkern.NoiseKey(2**32 - 1, 1, tensor=3)
    assert key.to("cpu").tolist() == [2**32 - 1, 1, 0, 3]
    assert key.to(torch.device("cpu")).dtype == torch.int64
    assert key == flatkern.NoiseKey(2**32 - 1, 1, 0, 3)
    assert hash(key) is not None


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="openblas"), flatkern.backend("openblas"):
        pass
    assert flatkern.available_backends("cpu")[-1] == "reference"


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton", "reference"])
def test_a_named_backend_never_falls_back(name):
    if name in flatkern.available_backends("cpu") or name in flatkern.available_backends("cuda"):
        with flatkern.backend(name):
            return
    with pytest.raises(RuntimeError, match=name), flatkern.backend(name):
        pass


def test_a_backend_of_another_device_is_refused():
    key, weight = flatkern.NoiseKey(1).to("cpu"), torch.ones(6, 12)
    for name in ("cuda", "triton"):
        if name not in flatkern.available_backends("cuda"):
            continue
        if name in flatkern.available_backends("cpu"):
            continue
        with flatkern.backend(name), pytest.raises((ValueError, RuntimeError), match=name):
            flatkern.ops.perturb_(weight, torch.ones(6), key)
    assert (weight == 1).all()


def test_the_backend_is_put_back_after_an_exception():
    with flatkern.backend("auto"):
        with pytest.raises(ZeroDivisionError), flatkern.backend("reference"):
            1 / (flatkern.build_info()["backend"] != "reference")
        assert flatkern.build_info()["backend"] == "auto"


def test_a_noise_key_in_place_of_its_tensor_is_explained():
    with pytest.raises(TypeError, match=r"must be Tensor, got NoiseKey, whose \.to\(device\)"):
        flatkern.ops.noise(2, 3, flatkern.NoiseKey(1))
