"""What only a GPU can show: graphs, streams, no synchronisation, more than 2^31 elements."""

import functools
import math

import pytest
import torch
from tolerances import assert_same_bits, row_norm_bound

import flatkern
from flatkern import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    if request.param not in flatkern.available_backends("cuda"):
        pytest.skip(f"{request.param} is not usable here")
    with flatkern.backend(request.param):
        yield request.param


def problem(rows=300, cols=520, dtype=torch.bfloat16, rank=4):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(dtype).cuda()
    lora_A = torch.randn(rank, cols, generator=generator).cuda()
    lora_B = torch.randn(rows, rank, generator=generator).cuda()
    scale = (torch.rand(rows, generator=generator) * 0.1).cuda()
    return weight, lora_A, lora_B, scale, flatkern.NoiseKey(1, 2, 3, 4).to("cuda")


def all_ops(weight, lora_A, lora_B, scale, key):
    """Every op once, on copies; all results."""
    rows, cols = weight.shape
    x = torch.ones(3, cols, dtype=weight.dtype, device="cuda", requires_grad=True)
    perturbed, merged = weight.clone(), weight.clone()
    ops.perturb_(perturbed, scale, key)
    restored = perturbed.clone()
    ops.restore_(restored, scale, key)
    c = ops.perturb_merged_(merged, lora_A, lora_B, 0.5, 0.1, key)
    y = ops.noisy_linear(x, weight, None, lora_A, lora_B, 0.5, scale, key)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return [
        ops.philox_bits(rows, cols, key),
        ops.noise(rows, cols, key),
        ops.uniform(rows, cols, key),
        *ops.foreach_row_norm([weight, weight], [lora_A] * 2, [lora_B] * 2, 0.5),
        ops.row_norm(weight, lora_A, lora_B, 0.5),
        ops.perturb(weight, scale, key, dtype=torch.float16),
        *(perturbed, restored, merged, c, y, grad),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_with_the_noise_of_the_key_in_its_tensor(backend, dtype):
    arguments = problem(dtype=dtype)
    key, scale = arguments[-1], arguments[-2]
    all_ops(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_ops(*arguments)
    for step in (7, 8):
        key.copy_(flatkern.NoiseKey(1, step, 3, 4).to("cuda"))
        scale.mul_(1.5)
        graph.replay()
        for got, expected in zip(captured, all_ops(*arguments), strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_of_a_training_step_sees_each_windows_noise(backend, autocast):
    torch.manual_seed(0)
    layers = [flatkern.nn.LoRALinear(96, 96, device="cuda", dtype=torch.float32) for _ in range(2)]
    model = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(40, 96, device="cuda")
    noise = flatkern.WeightNoise(model, 0.3)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = model(x).float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), noise.window(step=0):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with noise.window(step=0), torch.cuda.graph(graph):
        captured = step()
    losses = set()
    for number in (7, 8):
        with noise.window(step=number):
            graph.replay()
            for got, expected in zip(captured, step(), strict=True):
                assert_same_bits(got, expected)
            losses.add(captured[0].item())
    assert len(losses) == 2


def graphed_losses(recipe):
    """Losses of a few steps by a recipe of docs/graphs.md, or without graphs (None)."""
    torch.manual_seed(0)
    layers = [flatkern.nn.LoRALinear(64, 64, device="cuda") for _ in range(2)]
    model = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, noise = torch.optim.SGD(trained, lr=0.1), flatkern.WeightNoise(model, 0.3)
    batches = [torch.randn(40, 64, device="cuda") for _ in range(4)]
    forward = torch.compile(model, mode="reduce-overhead") if recipe == "compile" else model
    x, losses = torch.empty_like(batches[0]), []
    loss = torch.zeros((), device="cuda")

    def gradients():
        value = forward(x).square().mean()
        value.backward()
        loss.copy_(value.detach())

    if recipe == "capture":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), noise.window(step=0):
            gradients()
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with noise.window(step=0), torch.cuda.graph(graph):
            gradients()
    for step, batch in enumerate(batches):
        x.copy_(batch)
        with noise.window(step=step):
            graph.replay() if recipe == "capture" else gradients()
        optimizer.step()
        if recipe != "capture":
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", ["capture", "compile"])
def test_whole_steps_in_graphs(backend, recipe):
    expected = graphed_losses(None)
    torch.testing.assert_close(graphed_losses(recipe), expected, rtol=1e-4, atol=0)


def test_nothing_synchronises(backend):
    arguments = problem()
    all_ops(*arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_ops(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_kernels_run_on_the_current_stream(backend):
    weight, *_, scale, key = problem()
    expected = ops.perturb(weight, scale, key)
    late = torch.zeros_like(weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel on another stream would read zeros.
        torch.cuda._sleep(100_000_000)
        late.copy_(weight)
        got = ops.perturb(late, scale, key)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_the_tensors_device(backend):
    arguments = problem()
    expected = [result.cpu() for result in all_ops(*arguments)]
    moved = [argument.to("cuda:1") for argument in arguments]
    for got, one in zip(all_ops(*moved), expected, strict=True):
        assert_same_bits(got.cpu(), one)


@pytest.mark.parametrize("cols", [8, 100, 4096, 4097, 12000])
@pytest.mark.parametrize("rows", [1, 3, 4500])
@pytest.mark.parametrize("rank", [0, 5, 40])
def test_fused_bits_are_those_of_the_parts(backend, rows, cols, rank):
    weight, lora_A, lora_B, _, key = problem(rows, cols, rank=max(rank, 1))
    adapters = (lora_A, lora_B) if rank else (None, None)
    parts = weight.clone()
    c = ops.row_norm(parts, *adapters, 0.5) * (0.1 / math.sqrt(cols))
    ops.perturb_(parts, c, key)
    got = ops.perturb_merged_(weight, *adapters, 0.5, 0.1, key)
    assert_same_bits(got, c)
    assert_same_bits(weight, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [33, 4096, 4097])
@pytest.mark.parametrize("rows", [1, 40, 4500])
@pytest.mark.parametrize("rank", [17, 64, 150])
def test_row_norms_of_larger_ranks(backend, rows, cols, rank, dtype):
    weight, lora_A, lora_B, _, _ = problem(rows, cols, dtype, rank)
    got = ops.row_norm(weight, lora_A, lora_B, 0.5).double()
    W, A, B = weight.double(), lora_A.double(), 0.5 * lora_B.double()
    exact = (W + B @ A).norm(dim=1)
    scale = (W.abs() + B.abs() @ A.abs()).norm(dim=1)
    assert ((got - exact).abs() <= row_norm_bound(scale, rank)).all()


@pytest.mark.parametrize("cols", [4096, 4100, 4097])
def test_beyond_int32(backend, cols):
    rows = 2**31 // cols + 40
    if torch.cuda.mem_get_info()[0] < 3 * 4 * rows * cols:
        pytest.skip("needs 26 GB")
    key = flatkern.NoiseKey(1, 2, 3, 4).to("cuda")
    last = slice(rows - 20, rows)
    z = ops.noise(rows, cols, key)
    assert_same_bits(z[last], ops.noise(20, cols, key, row_offset=rows - 20))
    del z
    weight = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    scale = torch.full((rows,), 0.1, device="cuda")
    expected = ops.perturb(weight[last], scale[last], key, row_offset=rows - 20)
    ops.perturb_(weight, scale, key)
    assert_same_bits(weight[last], expected)
    norm = ops.row_norm(weight)
    assert_same_bits(norm[last], ops.row_norm(weight[last]))
    tail = weight[last].clone()
    c = ops.perturb_merged_(tail, None, None, 1.0, 0.1, key, row_offset=rows - 20)
    assert_same_bits(ops.perturb_merged_(weight, None, None, 1.0, 0.1, key)[last], c)
    assert_same_bits(weight[last], tail)


@pytest.fixture
def cuda_kernels():
    if "cuda" not in flatkern.available_backends("cuda"):
        pytest.skip("cuda is not usable here")
    with flatkern.backend("cuda"):
        yield


def residual_window(rows=40, cols=4112, dtype=torch.bfloat16, **options):
    """(weight, its clean copy, residual, arguments of perturb_ and restore_)."""
    weight, *_, scale, key = problem(rows, cols, dtype)
    residual = ops.new_residual(weight)
    return weight, weight.clone(), residual, {"row_scale": scale, "key": key, **options}


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (3000, 7), (700, 8), (300, 1000), (40, 4097), (4096, 4096)]
)
def test_windows_with_a_residual_are_exact(cuda_kernels, rows, cols, dtype, elementwise):
    weight, clean, residual, where = residual_window(rows, cols, dtype, elementwise=elementwise)
    weight.view(-1)[::97] = math.nan
    clean.copy_(weight)
    for _ in range(3):
        ops.perturb_(weight, **where, residual=residual)
        ops.check_residual(residual)
        assert_same_bits(weight, ops.perturb(clean, **where))
        ops.restore_(weight, **where, residual=residual)
        ops.check_residual(residual)
        assert_same_bits(weight, clean)


def test_a_residual_refuses_at_the_next_check(cuda_kernels):
    weight, clean, residual, where = residual_window()
    ops.restore_(weight, **where, residual=residual)
    with pytest.raises(RuntimeError, match="residual is empty"):
        ops.check_residual(residual)
    ops.perturb_(weight, **where, residual=residual)
    noisy = weight.clone()
    ops.perturb_(weight, **where, residual=residual)
    with pytest.raises(RuntimeError, match="filled by an earlier"):
        ops.check_residual(residual)
    for name, value in (
        ("seed", {"key": flatkern.NoiseKey(9, 2, 3, 4).to("cuda")}),
        ("row_scale", {"row_scale": where["row_scale"] * 2}),
        ("row_offset", {"row_offset": 1}),
    ):
        ops.restore_(weight, **{**where, **value}, residual=residual)
        with pytest.raises(RuntimeError, match=f"filled with {name} other"):
            ops.check_residual(residual)
    assert_same_bits(weight, noisy)
    weight[3, 5] += 1
    ops.restore_(weight, **where, residual=residual)
    with pytest.raises(RuntimeError, match="1 chunks of it differ"):
        ops.check_residual(residual)
    weight[3, 5] = noisy[3, 5]
    ops.restore_(weight, **where, residual=residual)
    ops.check_residual(residual)
    assert_same_bits(weight, clean)


def test_a_full_pool_of_a_gpu_leaves_chunks_alone(cuda_kernels):
    weight, clean, _, where = residual_window()
    residual = ops.new_residual(weight, 1000)
    ops.perturb_(weight, **where, residual=residual)
    with pytest.raises(RuntimeError, match="no room"):
        ops.check_residual(residual)
    ops.restore_(weight, **where, residual=residual)
    ops.check_residual(residual)
    assert_same_bits(weight, clean)


def test_residuals_synchronise_nowhere(cuda_kernels):
    weight, clean, _, where = residual_window()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        residual = ops.new_residual(weight)
        ops.perturb_(weight, **where, residual=residual)
        ops.restore_(weight, **where, residual=residual)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert_same_bits(weight, clean)


def test_a_graph_of_a_window_replays(cuda_kernels):
    weight, clean, residual, where = residual_window()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.perturb_(weight, **where, residual=residual)
        noisy = weight.clone()
        ops.restore_(weight, **where, residual=residual)
    for step in (7, 8):
        where["key"].copy_(flatkern.NoiseKey(1, step, 3, 4).to("cuda"))
        graph.replay()
        ops.check_residual(residual)
        assert_same_bits(weight, clean)
        assert_same_bits(noisy, ops.perturb(clean, **where))


# More tensors than a table holds: aligned or not, of one chunk or several, and empty.
SHAPES = [(1, 1), (0, 8), (33, 520), (3, 4112), (7, 1001), (16, 16), (4500, 8), (2, 4097)] * 6


def model_weights():
    """(weights, row scales, keys) of many."""
    problems = [problem(*shape, DTYPES[i // 8 % 3]) for i, shape in enumerate(SHAPES)]
    keys = [flatkern.NoiseKey(1, 2, 3, i).to("cuda") for i in range(len(problems))]
    return [p[0] for p in problems], [p[3] for p in problems], keys


def assert_all_same_bits(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def test_lists_have_the_bits_of_the_loop(backend):
    weights, scales, keys = model_weights()
    expected = list(map(ops.perturb, weights, scales, keys))
    ops.foreach_perturb_(weights, scales, keys)
    assert_all_same_bits(weights, expected)
    for weight, scale, key in zip(expected, scales, keys, strict=True):
        ops.restore_(weight, scale, key)
    ops.foreach_restore_(weights, scales, keys)
    assert_all_same_bits(weights, expected)
    assert_all_same_bits(ops.foreach_row_norm(weights), list(map(ops.row_norm, weights)))


@pytest.mark.parametrize("elementwise", [False, True])
def test_lists_with_residuals_are_exact(cuda_kernels, elementwise):
    weights, *operands = model_weights()
    clean = [weight.clone() for weight in weights]
    residuals = [ops.new_residual(weight) for weight in weights]
    options = {"elementwise": elementwise, "residuals": residuals}
    ops.foreach_perturb_(weights, *operands, **options)
    perturb = functools.partial(ops.perturb, elementwise=elementwise)
    assert_all_same_bits(weights, list(map(perturb, clean, *operands)))
    # One that is refused keeps its own tensor alone.
    noisy, spare = weights[2].clone(), operands[1][2].clone()
    operands[1][2].copy_(operands[1][3])
    ops.foreach_restore_(weights, *operands, **options)
    with pytest.raises(RuntimeError, match="filled with tensor other"):
        ops.check_residual(residuals[2])
    assert_same_bits(weights[2], noisy)
    operands[1][2].copy_(spare)
    last = [values[2:3] for values in (weights, *operands)]
    ops.foreach_restore_(*last, elementwise=elementwise, residuals=residuals[2:3])
    for residual in residuals:
        ops.check_residual(residual)
    assert_all_same_bits(weights, clean)


def test_a_graph_of_lists_replays(cuda_kernels):
    weights, *operands = model_weights()
    clean = [weight.clone() for weight in weights]
    residuals = [ops.new_residual(weight) for weight in weights]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.foreach_perturb_(weights, *operands, residuals=residuals)
        noisy = [weight.clone() for weight in weights]
        ops.foreach_restore_(weights, *operands, residuals=residuals)
    for step in (7, 8):
        for key in operands[1]:
            key[1] = step
        graph.replay()
        assert_all_same_bits(weights, clean)
        assert_all_same_bits(noisy, list(map(ops.perturb, clean, *operands)))
    for residual in residuals:
        ops.check_residual(residual)


def test_a_window_is_captured_in_a_graph(cuda_kernels):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 8)).bfloat16().cuda()
    flatkern.nn.replace_linear(model, "all-linear", r=4)
    noise = flatkern.WeightNoise(model, 0.3, mode="inplace", restore="residual")
    clean = [layer.weight.clone() for layer in model]
    # Keys and row scales take their places before the capture.
    with noise.window(3):
        expected = [layer.weight.clone() for layer in model]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), noise.window(3):
        noisy = [layer.weight.clone() for layer in model]
    for _ in range(2):
        graph.replay()
        assert_all_same_bits(noisy, expected)
        assert_all_same_bits([layer.weight for layer in model], clean)


@pytest.mark.parametrize("mode", ["virtual", "inplace"])
def test_flat_lora_trains_and_leaves_the_weights(backend, mode):
    def train(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8)
        )
        flatkern.nn.replace_linear(model, "all-linear", r=4)
        model.to(device)
        x = torch.randn(32, 64).to(device)
        frozen = [w.clone() for w in model.parameters() if not w.requires_grad]
        trained = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        method = flatkern.methods.FlatLoRA(model, optimizer, sigma=0.3, mode=mode)
        losses = [method.step(lambda batch: model(batch).square().mean(), [x]) for _ in range(5)]
        after = [w for w in model.parameters() if not w.requires_grad]
        for got, expected in zip(after, frozen, strict=True):
            assert_same_bits(got, expected)
        return losses

    got = train("cuda")
    with flatkern.backend("reference"):
        expected = train("cpu")
    # The same noise but for the tolerance of the hardware's functions.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=0)


def test_auto_takes_the_compiled_kernels():
    info = flatkern.build_info()
    usable = flatkern.available_backends("cuda")
    assert info["auto"]["cuda"] == usable[0]
    assert usable[0] in ("cuda", "triton"), info["backends"]
