"""foreach_row_norm, foreach_perturb_ and foreach_restore_: the loop over the ops for one tensor.

Those are held against the specification by their own tests; here every bit is that of the loop.
"""

import few
import pytest
import tolerances
import torch
from perturb_cases import DTYPES, make, make_key
from residuals import refused

import flatkern

OPS = torch.ops.flatkern
INPLACE = ("perturb_", "restore_")
# Many small ones, empty ones, one that is cut into blocks.
SHAPES = [(5, 7), (0, 4), (33, 129), (3, 0), (1, 1), (2, 8230), (16, 16), (9, 40), (4, 1)]
SHAPES = [s for s in SHAPES if s != (2, 8230)] if few.INTERPRETED else SHAPES


class Model:
    """Weights of all shapes and dtypes, and what the ops take with each of them."""

    def __init__(self, device, dtypes=DTYPES, shapes=SHAPES):
        pairs = [(shape, dtype) for shape in shapes for dtype in dtypes]
        made = [make(*pair, device, seed=i) for i, pair in enumerate(pairs)]
        # A slice of a larger matrix, and a kernel of a convolution.
        self.weights = [
            *(weight for weight, _ in made),
            make((6, 40), dtypes[-1], device)[0][:, 3:30],
            make((4, 18), dtypes[0], device)[0].view(4, 2, 3, 3),
        ]
        count = len(self.weights)
        self.row_scales = [make((w.shape[0], 1), torch.float32, device)[1] for w in self.weights]
        self.keys = [make_key(device, (3, 14, 15, i)) for i in range(count)]
        self.offsets = {
            "row_offsets": [1000 * i for i in range(count)],
            "col_offsets": [2**33 + i for i in range(count)],
        }

    def copies(self):
        """Of the weights, with their strides."""
        return [w.detach().clone(memory_format=torch.preserve_format) for w in self.weights]

    def of_one(self, i):
        return {"row_offset": self.offsets["row_offsets"][i], "col_offset": 2**33 + i}

    def loop(self, op, weights, residuals=None, **options):
        for i, weight in enumerate(weights):
            own = {} if residuals is None else {"residual": residuals[i]}
            single = getattr(flatkern.ops, op)
            single(weight, self.row_scales[i], self.keys[i], **own, **options, **self.of_one(i))
        return weights

    def foreach(self, op, weights, **options):
        function = getattr(flatkern.ops, f"foreach_{op}")
        result = function(weights, self.row_scales, self.keys, **options, **self.offsets)
        assert result is None
        return weights


def assert_all_same_bits(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        tolerances.assert_same_bits(one, other)


@pytest.fixture
def model(device):
    return Model(device)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("op", INPLACE)
def test_bits_of_the_loop(model, op, elementwise):
    options = {"elementwise": elementwise}
    expected = model.loop(op, model.copies(), **options)
    assert_all_same_bits(model.foreach(op, model.copies(), **options), expected)
    assert not torch.equal(expected[0], model.weights[0])


@pytest.mark.parametrize("op", INPLACE)
def test_offsets_are_zero_if_left_out(device, op):
    model = Model(device, DTYPES[:1], [(5, 7), (3, 9)])
    got, expected = model.copies(), model.copies()
    getattr(flatkern.ops, f"foreach_{op}")(got, tuple(model.row_scales), tuple(model.keys))
    for weight, scale, key in zip(expected, model.row_scales, model.keys, strict=True):
        getattr(flatkern.ops, op)(weight, scale, key)
    assert_all_same_bits(got, expected)


def adapters(weights, device, rank_of):
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for i, w in enumerate(weights):
        cols = w.numel() // w.shape[0] if w.shape[0] else w.shape[1]
        sizes = (rank_of(i), cols), (w.shape[0], rank_of(i))
        pairs.append([torch.randn(s, generator=generator).to(device, DTYPES[i % 3]) for s in sizes])
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_row_norms_of_the_loop(implementation, model, device):
    lora_As, lora_Bs = adapters(model.weights, device, lambda i: (1, 3, 8, 20)[i % 4])
    scalings = [0.5 + i for i in range(len(lora_As))]
    row_norm, foreach = flatkern.ops.row_norm, flatkern.ops.foreach_row_norm
    assert_all_same_bits(foreach(model.weights), [row_norm(w) for w in model.weights])
    lists = model.weights, lora_As, lora_Bs
    for factors, scaling in ((2, [2] * len(scalings)), (scalings, scalings)):
        norms = foreach(*lists, factors)
        for norm, *arguments in zip(norms, *lists, scaling, strict=True):
            tolerances.assert_same_norms(implementation, norm, row_norm(*arguments))
            assert norm.dtype == torch.float32
            assert not norm.requires_grad


def test_factors_and_where_row_norms_are_written(model, device):
    lora_As, lora_Bs = adapters(model.weights, device, lambda i: (1, 3, 8, 20)[i % 4])
    scalings = [0.5 + i for i in range(len(lora_As))]
    factors = [0.1 / (1 + i) for i in range(len(lora_As))]
    lists = model.weights, lora_As, lora_Bs, scalings
    foreach = flatkern.ops.foreach_row_norm
    expected = [norm * factor for norm, factor in zip(foreach(*lists), factors, strict=True)]
    out = [torch.full_like(norm, 7) for norm in expected]
    got = foreach(*lists, factors=factors, out=out)
    assert all(one is other for one, other in zip(got, out, strict=True))
    assert_all_same_bits(got, expected)
    with pytest.raises(ValueError, match="tensor 1: out must be"):
        foreach(*lists, out=[out[0], out[0][:1], *out[2:]])
    with pytest.raises(ValueError, match="factors must be as many as weights"):
        foreach(*lists, factors=factors[1:])


@pytest.mark.parametrize("op", INPLACE)
@pytest.mark.parametrize("residuals", [False, True])
def test_lists_that_were_checked(implementation, op, residuals):
    """Parameters as they are; what a residual refuses stands in it alone."""
    if residuals and not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    model = Model(implementation.device)
    matrices = [weight.flatten(1) for weight in model.weights]
    lora_As, lora_Bs = adapters(matrices, implementation.device, lambda i: 3)
    lists = matrices, lora_As, lora_Bs, [2.0] * len(matrices)
    expected = flatkern.ops.foreach_row_norm(*lists)
    parameters = [torch.nn.Parameter(lora_A) for lora_A in lora_As]
    norms = flatkern.ops.foreach_row_norm(matrices, parameters, *lists[2:], checked=True)
    assert_all_same_bits(norms, expected)
    assert not any(norm.requires_grad for norm in norms)
    options = {"residuals": new_residuals(matrices)} if residuals else {}
    if residuals and op == "restore_":
        model.foreach("perturb_", matrices, **options)
    copies = [w.clone(memory_format=torch.preserve_format) for w in matrices]
    own = {"residuals": [one.clone() for one in options["residuals"]]} if residuals else {}
    expected = model.foreach(op, copies, **own)
    versions = [weight._version for weight in matrices]
    assert_all_same_bits(model.foreach(op, matrices, checked=True, **options), expected)
    assert all(w._version > v for w, v in zip(matrices, versions, strict=True))
    if residuals:
        model.foreach(op, matrices, checked=True, **options)
        assert_all_same_bits(matrices, expected)
        with pytest.raises(RuntimeError, match=r"residual is empty|filled by an earlier"):
            flatkern.ops.check_residual(options["residuals"][0])


def test_empty_lists(device):
    assert flatkern.ops.foreach_row_norm([]) == []
    assert flatkern.ops.foreach_row_norm([], [], [], []) == []
    for op in INPLACE:
        assert getattr(flatkern.ops, f"foreach_{op}")([], [], []) is None
        assert getattr(flatkern.ops, f"foreach_{op}")([], [], [], residuals=[]) is None


def test_float64_beside_the_others():
    """Under auto: each dtype goes where it goes alone."""
    model = Model("cpu", [*DTYPES, torch.float64], [(5, 7), (2, 300)])
    for op in INPLACE:
        expected = model.loop(op, model.copies())
        assert_all_same_bits(model.foreach(op, model.copies()), expected)
    row_norm = flatkern.ops.row_norm
    norms = flatkern.ops.foreach_row_norm(model.weights)
    assert_all_same_bits(norms, [row_norm(w) for w in model.weights])


def test_any_number_of_threads(threads):
    """Threads share the work of all tensors; who gets which part does not matter."""
    model = Model("cpu", shapes=[*SHAPES, (300, 500), (2000, 3), (64, 512)])
    lists = model.weights, *adapters(model.weights, "cpu", lambda i: i % 5)
    with flatkern.backend("cpu"):
        expected = [model.loop(op, model.copies()) for op in INPLACE]
        norms = [flatkern.ops.row_norm(*t) for t in zip(*lists, strict=True)]
        for count in (1, 2, 3, 7, 16):
            threads(count)
            for op, loop in zip(INPLACE, expected, strict=True):
                assert_all_same_bits(model.foreach(op, model.copies()), loop)
            assert_all_same_bits(flatkern.ops.foreach_row_norm(*lists), norms)


def new_residuals(weights, pool_bytes=None):
    return [flatkern.ops.new_residual(weight, pool_bytes) for weight in weights]


@pytest.fixture
def with_residual(implementation):
    if not implementation.residual:
        pytest.skip(f"{implementation.name} has no residual")
    return Model(implementation.device)


# None: every chunk has room. 100 bytes: short chunks alone.
@pytest.mark.parametrize("pool_bytes", [None, 100])
def test_residuals(with_residual, pool_bytes):
    model, weights = with_residual, with_residual.copies()
    alone, together = (new_residuals(weights, pool_bytes) for _ in range(2))
    expected = model.loop("perturb_", model.copies(), alone)
    noisy = model.foreach("perturb_", weights, residuals=together)
    need = flatkern.ops.residual.pool_need
    assert [need(one)[0] for one in together] == [need(one)[0] for one in alone]
    if pool_bytes is None:
        # With too little room, which chunks find some depends on the order of threads.
        assert_all_same_bits(noisy, expected)
    model.foreach("restore_", weights, residuals=together)
    assert_all_same_bits(weights, model.weights)
    assert not any(map(flatkern.ops.residual.is_filled, together))


@pytest.fixture
def refuses(with_residual, implementation):
    if implementation.name == "cuda":
        pytest.skip("refuses at check_residual: the tests of kernels that wait for nothing")
    return with_residual


def test_residual_that_is_filled_already(refuses):
    model, weights = refuses, refuses.copies()
    residuals = new_residuals(weights)
    spare = weights[5].clone()
    scale_and_key = model.row_scales[5], model.keys[5]
    flatkern.ops.perturb_(spare, *scale_and_key, residual=residuals[5])
    before = [residual.clone() for residual in residuals]
    with pytest.raises(RuntimeError, match=r"foreach_perturb_: tensor 5: residual was filled"):
        model.foreach("perturb_", weights, residuals=residuals)
    assert_all_same_bits(weights, model.weights)
    # But for the word that says why.
    residuals[5][100:104] = 0
    assert_all_same_bits(residuals, before)


def test_residual_that_is_empty(refuses):
    model, weights = refuses, refuses.copies()
    residuals = new_residuals(weights)
    model.foreach("perturb_", weights, residuals=residuals)
    noisy = [weight.clone() for weight in weights]
    residuals[7] = flatkern.ops.new_residual(weights[7])
    with pytest.raises(RuntimeError, match=r"foreach_restore_: tensor 7: residual is empty"):
        model.foreach("restore_", weights, residuals=residuals)
    assert_all_same_bits(weights, noisy)


def others(values, i):
    return [*values[:i], *values[i + 1 :]]


def test_weight_that_changed_does_not_keep_the_others(with_residual):
    model, weights = with_residual, with_residual.copies()
    residuals = new_residuals(weights)
    model.foreach("perturb_", weights, residuals=residuals)
    kept = weights[6][0, 0].clone()
    weights[6][0, 0] = 77
    with refused(residuals[6], "weight is not what perturb_ left: 1 chunks") as raised:
        model.foreach("restore_", weights, residuals=residuals)
    assert residuals[6].is_cuda or "tensor 6" in str(raised.value)
    assert_all_same_bits(others(weights, 6), others(model.weights, 6))
    weights[6][0, 0] = kept
    scale_and_key = model.row_scales[6], model.keys[6]
    flatkern.ops.restore_(weights[6], *scale_and_key, residual=residuals[6], **model.of_one(6))
    tolerances.assert_same_bits(weights[6], model.weights[6])


@pytest.mark.parametrize("op", INPLACE)
def test_kernels_that_wait_for_nothing_leave_out_what_they_refuse(
    with_residual, implementation, op
):
    if implementation.name != "cuda":
        pytest.skip("refuses at the call")
    model, weights, i = with_residual, with_residual.copies(), 5
    residuals, done, match = new_residuals(weights), model.weights, "residual is empty"
    if op == "restore_":
        model.foreach("perturb_", weights, residuals=residuals)
        residuals[i] = flatkern.ops.new_residual(weights[i])
    else:
        done, match = model.loop("perturb_", model.copies()), "residual was filled"
        spare = weights[i].clone()
        flatkern.ops.perturb_(spare, model.row_scales[i], model.keys[i], residual=residuals[i])
    before = weights[i].clone()
    with refused(residuals[i], match):
        model.foreach(op, weights, residuals=residuals)
    tolerances.assert_same_bits(weights[i], before)
    assert_all_same_bits(others(weights, i), others(done, i))
    for residual in others(residuals, i):
        flatkern.ops.check_residual(residual)


@pytest.mark.parametrize("op", INPLACE)
def test_a_tensor_twice_and_one_that_overlaps(device, op):
    """As in the loop, each sees what those before it wrote."""

    def run(function):
        base = make((12, 64), torch.float32, device)[0]
        weights = [
            base[:5],
            base[3:],
            base[:, 8:40],
            base[:5],
            make((40, 300), torch.float32, device)[0],
        ]
        scales = [torch.full((w.shape[0],), 0.5, device=device) for w in weights]
        function(weights, scales, [make_key(device, (1, 2, 3, i)) for i in range(5)])
        return [base, weights[-1]]

    def loop(*lists):
        for tensors in zip(*lists, strict=True):
            getattr(flatkern.ops, op)(*tensors)

    assert_all_same_bits(run(getattr(flatkern.ops, f"foreach_{op}")), run(loop))


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("op", INPLACE)
def test_overlapping_weights_wait_for_each_other(threads, op, residuals):
    """The same weight ends one thread's half of the work and begins the other's.

    Taken at once, it would be done with by the second thread before the first comes to it.
    """
    threads(2)
    with flatkern.backend("cpu"):
        base, long = make((8, 4096), torch.float32, "cpu")[0], torch.empty(512, 4096)
        weights = [long.clone().fill_(1), base, base[1:], long.clone().fill_(1)]
        scales = [torch.full((w.shape[0],), 0.5) for w in weights]
        keys = [make_key("cpu", (1, 2, 3, i)) for i in range(len(weights))]
        options = {"residuals": new_residuals(weights)} if residuals else {}
        if op == "restore_" and residuals:
            for i in range(len(weights)):
                own = weights[i], scales[i], keys[i]
                flatkern.ops.perturb_(*own, residual=options["residuals"][i])
            weights, scales, keys, options["residuals"] = (
                values[::-1] for values in (weights, scales, keys, options["residuals"])
            )
        expected = base.clone()
        pieces = [expected[:], expected[1:]]
        order = [i for i, w in enumerate(weights) if w.shape[0] < 100]
        clones = [r.clone() for r in options.get("residuals", ())]
        for i in order:
            own = {"residual": clones[i]} if residuals else {}
            piece = pieces[weights[i].shape[0] == 7]
            getattr(flatkern.ops, op)(piece, scales[i], keys[i], **own)
        getattr(flatkern.ops, f"foreach_{op}")(weights, scales, keys, **options)
        tolerances.assert_same_bits(base, expected)


@pytest.mark.parametrize("op", INPLACE)
def test_residuals_that_share_memory(with_residual, device, op):
    """Nothing is written, the headers included."""
    weights = [make((4, 300), torch.float32, device, seed=i)[0] for i in range(3)]
    scales = [torch.full((4,), 0.01, device=device)] * 3
    keys = [make_key(device, (1, 2, 3, i)) for i in range(3)]
    bytes_of_one = flatkern.ops.new_residual(weights[0]).numel()
    both = torch.cat([new_residuals(weights)[0], torch.zeros(64, dtype=torch.uint8, device=device)])
    other = flatkern.ops.new_residual(weights[1])
    for shared in (both[:bytes_of_one], both[64:]):
        residuals = [both[:bytes_of_one], other, shared]
        before = [tensor.clone() for tensor in (*weights, *residuals)]
        with pytest.raises(
            ValueError,
            match=rf"foreach_{op}: residuals must be one for every weight, got residuals\[2\] in",
        ):
            getattr(flatkern.ops, f"foreach_{op}")(weights, scales, keys, residuals=residuals)
        assert_all_same_bits([*weights, *residuals], before)


def test_order_where_dtypes_overlap(device):
    """All that a backend serves goes in order, whatever its dtype."""
    base = make((12, 64), torch.float32, device)[0]
    halves = base.view(torch.bfloat16)
    weights = [base[:5], halves[3:], base[4:]]
    scales = [torch.full((w.shape[0],), 0.5, device=device) for w in weights]
    keys = [make_key(device, (1, 2, 3, i)) for i in range(3)]
    expected = base.clone()
    pieces = [expected[:5], expected.view(torch.bfloat16)[3:], expected[4:]]
    for one in zip(pieces, scales, keys, strict=True):
        flatkern.ops.perturb_(*one)
    flatkern.ops.foreach_perturb_(weights, scales, keys)
    tolerances.assert_same_bits(base, expected)


BAD = {
    "weights": (torch.ones(4, 6, dtype=torch.int32), "weight must be float32"),
    "row_scales": (torch.ones(5), r"row_scale must be contiguous float32 \[4\]"),
    "keys": (torch.ones(4), "key must be int64"),
    "row_offsets": (-1, "row_offset must be at least 0"),
    "col_offsets": (2**34, "col_offset"),
}


@pytest.mark.parametrize("op", INPLACE)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("at", [0, 2])
def test_one_bad_value_among_many(device, op, name, at):
    weights = [make((4, 6), torch.float32, device)[0] for _ in range(3)]
    lists = {
        "weights": list(weights),
        "row_scales": [torch.ones(4, device=device)] * 3,
        "keys": [make_key(device)] * 3,
        "row_offsets": [0] * 3,
        "col_offsets": [0] * 3,
    }
    value, message = BAD[name]
    lists[name][at] = value.to(device) if isinstance(value, torch.Tensor) else value
    before = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    with pytest.raises(ValueError, match=f"foreach_{op}: tensor {at}: {message}"):
        getattr(flatkern.ops, f"foreach_{op}")(**lists)
    assert_all_same_bits(weights, before)
    assert [weight._version for weight in weights] == versions


def good(device):
    weights = [make((4, 6), torch.float32, device)[0] for _ in range(2)]
    lists = adapters(weights, device, lambda i: 3)
    norms = dict(
        zip(
            ("weights", "lora_As", "lora_Bs", "scalings"),
            (weights, *lists, [1.0, 2.0]),
            strict=True,
        )
    )
    inplace = {
        "weights": weights,
        "row_scales": [torch.ones(4, device=device)] * 2,
        "keys": [make_key(device)] * 2,
        "residuals": None,
        "row_offsets": [0, 0],
        "col_offsets": [0, 0],
    }
    return {"foreach_row_norm": norms, "foreach_perturb_": inplace, "foreach_restore_": inplace}


OPERANDS = [(op, name) for op, lists in good("cpu").items() for name in lists]


@pytest.mark.parametrize(("op", "name"), OPERANDS)
def test_wrong_kinds_and_lengths(op, name):
    arguments = good("cpu")[op]
    run = getattr(flatkern.ops, op)
    for value, kind in ((3 + 1j, "complex"), ("no", "str"), (torch.ones(2), "Tensor")):
        with pytest.raises(TypeError, match=f"{op}: {name} must be .*list.*, got {kind}"):
            run(**arguments | {name: value})
    right = (arguments[name] or [torch.zeros(200, dtype=torch.uint8)])[0]
    with pytest.raises(TypeError, match=rf"{op}: {name}\[1\] must be .*, got NoneType"):
        run(**arguments | {name: [right, None]})
    if name != "weights":
        with pytest.raises(ValueError, match=f"{op}: {name} must be as many as weights, 2, got 1"):
            run(**arguments | {name: (right,)})


def test_one_adapter_list_without_the_other(device):
    arguments = good(device)["foreach_row_norm"]
    for name, other in (("lora_As", "lora_Bs"), ("lora_Bs", "lora_As")):
        with pytest.raises(
            ValueError, match=f"foreach_row_norm: {name} must be given together with {other}"
        ):
            flatkern.ops.foreach_row_norm(**arguments | {name: None})
    arguments["lora_Bs"][1] = arguments["lora_Bs"][1][:3]
    with pytest.raises(
        ValueError, match=r"foreach_row_norm: tensor 1: lora_B must be floating \[4, 3\]"
    ):
        flatkern.ops.foreach_row_norm(**arguments)


@pytest.mark.parametrize("op", INPLACE)
def test_version_counters(device, op):
    model = Model(device, DTYPES[:1], [(5, 7), (0, 4), (3, 9)])
    weights = [torch.nn.Parameter(weight) for weight in model.copies()]
    outputs = [(weight * weight).sum() for weight in weights]
    versions = [weight._version for weight in weights]
    model.foreach(op, weights)
    assert all(w._version > before for w, before in zip(weights, versions, strict=True))
    for output in outputs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_inference_tensors(device):
    model = Model(device, DTYPES[:1], [(5, 7), (3, 9)])
    expected = model.loop("perturb_", model.copies())
    with torch.inference_mode():
        weights = model.copies()
        assert_all_same_bits(model.foreach("perturb_", weights), expected)


def test_norms_are_constant_to_autograd(device):
    arguments = good(device)["foreach_row_norm"]
    trained = {
        name: [t.requires_grad_() for t in arguments[name]] for name in ("weights", "lora_As")
    }
    assert not any(
        norm.requires_grad for norm in flatkern.ops.foreach_row_norm(**arguments | trained)
    )


def overload_cases(device):
    model = Model(device, DTYPES[:2], [(5, 7), (3, 9)])
    offsets = {name: [3] * len(model.keys) for name in model.offsets}
    lists = model.weights, model.row_scales, model.keys
    options = {"elementwise": False, "residuals": [], **offsets}
    loras = adapters(model.weights, device, lambda i: 2)
    ones = [1.0] * len(model.keys)
    return [
        (OPS.foreach_row_norm.default, (model.weights, *loras, ones), {}),
        (OPS.foreach_row_norm.default, (model.weights, [], [], ones), {}),
        (OPS.foreach_perturb_.default, lists, options),
        (OPS.foreach_restore_.default, lists, options),
    ]


@pytest.mark.parametrize("case", range(4))
def test_opcheck(device, case):
    op, args, kwargs = overload_cases(device)[case]
    torch.library.opcheck(op, args, kwargs)


def test_opcheck_with_residuals(with_residual):
    weights = with_residual.copies()[:2]
    options = {"elementwise": False, "residuals": new_residuals(weights)}
    offsets = {"row_offsets": [0, 0], "col_offsets": [0, 0]}
    lists = weights, with_residual.row_scales[:2], with_residual.keys[:2]
    torch.library.opcheck(OPS.foreach_perturb_.default, lists, {**options, **offsets})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(device, dynamic):
    model = Model(device, DTYPES[:2], [(5, 7), (3, 9)])
    loras = adapters(model.weights, device, lambda i: 2)

    def window(weights, factor):
        weights = [weight * factor for weight in weights]
        norms = flatkern.ops.foreach_row_norm(weights, *loras, 2.0)
        flatkern.ops.foreach_perturb_(weights, norms, model.keys)
        noisy = [weight + 0 for weight in weights]
        flatkern.ops.foreach_restore_(weights, norms, model.keys)
        return norms + noisy + weights

    factor = torch.tensor(2.0, device=device)
    compiled = torch.compile(window, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = window(model.weights, factor)
    assert_all_same_bits(compiled(model.weights, factor), expected)
