"""perturb, perturb_ and restore_: views, shapes, shards, threads, autograd and memory."""

import few
import pytest
import tolerances
import torch
import torch.nn.functional as F
from perturb_cases import DTYPES, LOWER, SENTINEL, check_all_forms, make, make_key

import flatkern

VIEWS = {
    "columns from 3": lambda base: base[:, 3:-5],
    "columns from 0": lambda base: base[:, :-1],
    "one column": lambda base: base[:, 4:5],
    "every second row": lambda base: base[::2],
    "rows and columns": lambda base: base[1:-1:3, 1:30],
    "one row": lambda base: base[3:4, 2:],
    "a row as a column": lambda base: base.T[:, 3:4],
}


def calls_in_place(weight, scale, key):
    yield lambda: flatkern.ops.perturb_(weight, scale, key)
    yield lambda: flatkern.ops.restore_(weight, scale, key)
    yield lambda: flatkern.ops.perturb_(weight, scale, key, elementwise=True)
    yield lambda: flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_written_without_their_neighbours(device, view, dtype):
    key = make_key(device)
    for index in few.cases(3, range(4)):
        base = torch.full((11, 75), SENTINEL, dtype=dtype, device=device)
        weight = VIEWS[view](base)
        values, scale = make(tuple(weight.shape), dtype, device)
        weight.copy_(values)
        inside = torch.zeros(base.shape, dtype=torch.bool, device=device)
        VIEWS[view](inside).fill_(True)
        dense = values.clone()
        list(calls_in_place(weight, scale, key))[index]()
        list(calls_in_place(dense, scale, key))[index]()
        tolerances.assert_same_bits(weight, dense)
        assert (base[~inside] == SENTINEL).all()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("dtype", "lower"), [*LOWER[:2], LOWER[3]], ids=str)
def test_slices_are_read_and_given_as_out(device, view, dtype, lower):
    key = make_key(device)
    base = torch.full((11, 75), float("nan"), dtype=dtype, device=device)
    weight = VIEWS[view](base)
    values, scale = make(tuple(weight.shape), dtype, device)
    weight.copy_(values)
    expected = flatkern.ops.perturb(values, scale, key, dtype=lower)
    tolerances.assert_same_bits(flatkern.ops.perturb(weight, scale, key, dtype=lower), expected)
    target = torch.full((11, 75), SENTINEL, dtype=lower, device=device)
    inside = torch.zeros(target.shape, dtype=torch.bool, device=device)
    VIEWS[view](inside).fill_(True)
    flatkern.ops.perturb(weight, scale, key, out=VIEWS[view](target))
    tolerances.assert_same_bits(VIEWS[view](target), expected)
    assert (target[~inside] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_the_weight_itself(device, dtype):
    weight, scale = make((6, 60), dtype, device)
    expected = flatkern.ops.perturb(weight, scale, make_key(device))
    flatkern.ops.perturb(weight, scale, make_key(device), out=weight)
    tolerances.assert_same_bits(weight, expected)


@pytest.mark.parametrize("shift", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_that_overlaps_the_weight_is_refused(device, dtype, shift):
    # Vectors of it would be overwritten before they are read.
    base, scale = make((6, 60), dtype, device)
    original = base.clone()
    with pytest.raises(ValueError, match="out"):
        flatkern.ops.perturb(base[:, :40], scale, make_key(device), out=base[:, shift : shift + 40])
    tolerances.assert_same_bits(base, original)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_lie_beside_the_weight(device, dtype):
    # Disjoint columns of one storage: the address ranges overlap, the elements do not.
    base, scale = make((6, 60), dtype, device)
    weight, out = base[:, :30], base[:, 30:]
    expected = flatkern.ops.perturb(weight, scale, make_key(device))
    flatkern.ops.perturb(weight, scale, make_key(device), out=out)
    tolerances.assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (4, 2, 3), (5,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_of_dimensions_are_dim0_by_rest(implementation, device, shape, dtype):
    weight, scale = make(shape, dtype, device)
    flat = weight.reshape(shape[0], -1).clone()
    noisy = check_all_forms(implementation, weight, scale, make_key(device))
    assert noisy.shape == shape
    flat = flatkern.ops.perturb(flat, scale, make_key(device))
    tolerances.assert_same_bits(noisy.reshape(shape[0], -1), flat.cpu())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(device, shape, dtype):
    weight = torch.empty(shape, dtype=dtype, device=device)
    scale = torch.ones(shape[0], device=device)
    key = make_key(device)
    assert flatkern.ops.perturb(weight, scale, key).shape == shape
    assert flatkern.ops.perturb(weight, scale, key, dtype=torch.bfloat16).dtype == torch.bfloat16
    flatkern.ops.perturb_(weight, scale, key)
    flatkern.ops.restore_(weight, scale, key)
    assert flatkern.ops.perturb_merged_(weight, None, None, 1.0, 0.1, key).shape == shape[:1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_have_the_bits_of_the_whole(device, dtype):
    weight, scale = make((23, 77), dtype, device)
    key = make_key(device)
    whole = flatkern.ops.perturb(weight, scale, key, row_offset=9, col_offset=2)
    for rows, cols in (
        ((0, 12), (0, 77)),
        ((12, 23), (0, 77)),
        ((5, 6), (1, 3)),
        ((0, 23), (30, 77)),
    ):
        window = slice(*rows), slice(*cols)
        part = weight[window].clone()
        offsets = {"row_offset": 9 + rows[0], "col_offset": 2 + cols[0]}
        flatkern.ops.perturb_(part, scale[window[0]], key, **offsets)
        tolerances.assert_same_bits(part, whole[window])


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_does_not_matter(device, threads, dtype):
    weight, scale = make((301, 1031), dtype, device)
    key = make_key(device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        in_place = weight.clone()
        flatkern.ops.perturb_(in_place, scale, key)
        restored = in_place.clone()
        flatkern.ops.restore_(restored, scale, key)
        results.append((in_place, restored, flatkern.ops.perturb(weight, scale, key)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            tolerances.assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_loses_at_most_one_step_of_the_larger(device, dtype):
    weight, scale = make((50, 301), dtype, device)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key)
    restored = noisy.clone()
    flatkern.ops.restore_(restored, scale, key)
    larger = torch.maximum(weight.abs(), noisy.abs()).double().cpu()
    # Half a step for each of the two roundings, and float32's own rounding of both sums.
    bound = tolerances.ulp(larger, dtype) + tolerances.ulp(larger, torch.float32)
    tolerances.assert_within(restored, weight, bound)
    assert (restored == weight).double().mean() > 0.3


def test_restore_of_float32_that_holds_bfloat16_is_exact_after_rounding(device):
    # The noise is of the weight's size, so the float32 errors are far below half a bfloat16 step.
    weight, _ = make((40, 257), torch.bfloat16, device)
    held = weight.float()
    scale = torch.full((40,), 0.02, device=device)
    key = make_key(device)
    flatkern.ops.perturb_(held, scale, key)
    assert (held != weight).double().mean() > 0.99
    flatkern.ops.restore_(held, scale, key)
    away_from_zero = weight.abs() > 1e-4
    assert (held.bfloat16() == weight)[away_from_zero].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_restore_is_near(device, dtype):
    weight, scale = make((20, 101), dtype, device)
    scale = scale.clamp_max(0.05)
    key = make_key(device)
    noisy = flatkern.ops.perturb(weight, scale, key, elementwise=True)
    restored = noisy.clone()
    flatkern.ops.restore_(restored, scale, key, elementwise=True)
    # S = W (1 + c z sign) rounded; dividing by a factor above 0.75 loses less than two steps more.
    larger = torch.maximum(weight.abs(), noisy.abs()).double().cpu()
    tolerances.assert_within(restored, weight, 2 * tolerances.ulp(larger, dtype))
    assert (restored != weight).double().mean() < 0.5 * (noisy != weight).double().mean()


def test_flush_denormal_does_not_change_results(implementation, device, threads):
    if not implementation.ignores_flush_denormal:
        pytest.skip(f"{implementation.name} computes with the flag that PyTorch is given")
    key = make_key(device)
    scale = torch.tensor([1e-45, 1e-41, 3e-39, 1e-38, 0.0, 1e-7], device=device)

    steps = torch.arange(-200, 200, device=device, dtype=torch.float64) / 128
    originals = [
        (steps * torch.finfo(dtype).tiny).to(dtype).repeat(len(scale), 1) for dtype in DTYPES
    ]

    def run():
        results = [flatkern.ops.noise(64, 64, key)]
        for original in originals:
            weight = original.clone()
            results.append(flatkern.ops.perturb(weight, scale, key))
            flatkern.ops.perturb_(weight, scale, key)
            results += [weight, flatkern.ops.row_norm(weight)]
        return [tolerances.bits(result) for result in results]

    threads(1)
    expected = run()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = run()
    finally:
        torch.set_flush_denormal(False)
    for index, (after, before) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(after, before), index


def in_place_calls(device):
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    return {
        "perturb_": lambda w: flatkern.ops.perturb_(w, scale, key),
        "restore_": lambda w: flatkern.ops.restore_(w, scale, key),
        "perturb_merged_": lambda w: flatkern.ops.perturb_merged_(w, None, None, 1.0, 0.1, key),
        "perturb.out": lambda w: flatkern.ops.perturb(torch.ones_like(w), scale, key, out=w),
    }


IN_PLACE = ["perturb_", "restore_", "perturb_merged_", "perturb.out"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_version_counter(device, name, compiled):
    call = in_place_calls(device)[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    base = torch.ones(4, 16, device=device)
    weight = base[:, :8] if not compiled else base
    before = weight._version
    call(weight)
    assert weight._version > before
    assert base._version == weight._version


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_backward_after_a_write_raises(device, name, compiled):
    call = in_place_calls(device)[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    weight = torch.ones(4, 16, device=device)
    x = torch.ones(2, 16, device=device, requires_grad=True)
    loss = F.linear(x, weight).sum()
    call(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(device):
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    normal = torch.ones(4, 16, device=device)
    expected = flatkern.ops.perturb(normal, scale, key)
    before = normal._version
    with torch.inference_mode():
        inference = torch.ones(4, 16, device=device)
        for weight in (normal, inference):
            tolerances.assert_same_bits(flatkern.ops.perturb(weight, scale, key), expected)
            flatkern.ops.perturb_(weight, scale, key)
            tolerances.assert_same_bits(weight, expected)
    assert normal._version > before


def test_parameter_under_no_grad(device):
    weight = torch.nn.Parameter(torch.ones(4, 16, device=device))
    scale, key = torch.full((4,), 0.1, device=device), make_key(device)
    expected = flatkern.ops.perturb(weight, scale, key).detach()
    with torch.no_grad():
        flatkern.ops.perturb_(weight, scale, key)
    tolerances.assert_same_bits(weight, expected)
    assert weight.is_leaf
    assert weight.requires_grad


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize(("dtype", "lower"), LOWER, ids=str)
def test_gradient_of_the_weight_is_the_identity(device, dtype, lower, elementwise):
    weight, scale = make((5, 30), dtype, device)
    weight.requires_grad_()
    noisy = flatkern.ops.perturb(
        weight, scale, make_key(device), dtype=lower, elementwise=elementwise
    )
    gradient = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).to(device, lower)
    noisy.backward(gradient)
    tolerances.assert_same_bits(weight.grad, gradient.to(dtype))


def test_scale_is_a_constant_to_autograd(device):
    weight, scale = make((5, 30), torch.float32, device)
    scale.requires_grad_()
    assert not flatkern.ops.perturb(weight, scale, make_key(device)).requires_grad
    weight.requires_grad_()
    flatkern.ops.perturb(weight, scale, make_key(device)).sum().backward()
    assert scale.grad is None
    with torch.no_grad():
        expected = flatkern.ops.perturb(weight, scale, make_key(device))
    plain = weight.detach().clone()
    flatkern.ops.perturb_(plain, scale, make_key(device))
    tolerances.assert_same_bits(plain, expected)
    assert not plain.requires_grad
