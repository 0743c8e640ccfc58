"""Weights and gradients of other kinds than a strided real matrix that every pass uses."""

import pytest
import torch
from method_cases import loss_fn_of, make_batches, make_model, sgd
from torch import nn

from flatkern import methods

WHOLE = [
    (methods.LoRA, {}),
    (methods.SAM, {"rho": 0.3}),
    (methods.SAM, {"rho": 0.3, "norm": "per_tensor"}),
    (methods.ASAM, {"rho": 0.3}),
    (methods.RWP, {"sigma": 0.1}),
    (methods.ARWP, {"sigma": 0.1}),
    (methods.MixedRWP, {"sigma": 0.1}),
    (methods.MixedRWP, {"sigma": 0.1, "strategy": "fisher"}),
    (methods.LPFSGD, {"sigma": 0.1}),
    (methods.MeZO, {"mu": 1e-2}),
]
every_whole = pytest.mark.parametrize(("kind", "options"), WHOLE)


class Words(nn.Module):
    """An embedding, tied to nothing; one weight that is never used, an empty and a frozen one."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, sparse=sparse)
        self.out = nn.Linear(4, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.double()

    def forward(self, ids):
        return self.out(self.words(ids))


def train(model, kind, options, batches, **more):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method = kind(model, optimizer, **options, **more)
    losses = [method.step(loss_fn_of(model), batches) for _ in range(3)]
    return [torch.tensor(losses), *(p.detach().clone() for p in model.parameters())]


@every_whole
@pytest.mark.parametrize("clip", [None, 0.05])
def test_sparse_gradients_are_those_of_a_dense_embedding(kind, options, clip):
    batches = [torch.tensor([1, 2, 2, 7]), torch.tensor([0, 1])]
    results = [
        train(Words(sparse), kind, options, batches, max_grad_norm=clip) for sparse in (True, False)
    ]
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


class Spectrum(nn.Module):
    """A complex weight, or its real and imaginary parts."""

    def __init__(self, is_complex):
        super().__init__()
        torch.manual_seed(0)
        value = torch.randn(3, 4, dtype=torch.complex128)
        self.w = nn.Parameter(value if is_complex else torch.view_as_real(value).clone())
        self.b = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        y = torch.complex(x, x.flip(0)) @ w + self.b
        return torch.cat([y.real, y.imag.tanh()])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (methods.LoRA, {}),
        (methods.SAM, {"rho": 0.3}),
        (methods.SAM, {"rho": 0.3, "norm": "per_tensor"}),
        (methods.MeZO, {"mu": 1e-2}),
    ],
)
def test_a_complex_weight_is_its_two_real_parts(kind, options):
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    results = [train(Spectrum(c), kind, options, batches) for c in (True, False)]
    for mine, right in zip(*results, strict=True):
        mine = torch.view_as_real(mine) if mine.is_complex() else mine
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_asam_s_metric_of_a_complex_weight_is_its_magnitude():
    model = Spectrum(True)
    before, points = model.w.detach().clone(), []

    def loss_fn(x):
        points.append(model.w.detach().clone())
        return loss_fn_of(model)(x)

    batch = torch.randn(5, 3, dtype=torch.float64)
    grads = torch.autograd.grad(loss_fn_of(model)(batch), [model.w, model.b])
    methods.ASAM(model, torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3).step(loss_fn, [batch])
    T = before.abs() + 0.01
    norm = ((T * grads[0]).abs().square().sum() + grads[1].square().sum()).sqrt()
    torch.testing.assert_close(points[1] - before, 0.3 * T * T * grads[0] / norm)
    assert torch.equal(model.w, before)


@pytest.mark.parametrize(
    "kind", [methods.RWP, methods.ARWP, methods.MixedRWP, methods.LPFSGD, methods.FlatLoRA]
)
def test_complex_weights_without_noise_are_named(kind):
    model = Spectrum(True)
    options = {"scope": "origin"} if kind is methods.FlatLoRA else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"no noise on w \(complex128\)"):
        kind(model, optimizer, **options)


@every_whole
def test_what_is_not_all_there_is_refused(kind, options):
    model = Words()
    model.out.weight = nn.Parameter(torch.empty(1, 4, device="meta", dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out.weight must be held whole .* meta device"):
        train(model, kind, options, [])
    model = Words()
    method = kind(model, sgd(model), **options)
    # Partitioned after the method was made.
    model.out.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"out.weight must be held whole .* ZeRO"):
        method.step(loss_fn_of(model), [torch.tensor([1])])


@pytest.mark.parametrize("kind", [methods.LoRA, methods.SAM, methods.RWP, methods.MeZO])
def test_trainable_weights_of_8_bits_are_refused(kind):
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"16 to 64 bits or complex, got .*scale.*float8"):
        kind(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [*WHOLE, (methods.FMLoRA, {}), (methods.BAR, {})], ids=str)
def test_after_a_loss_that_is_not_finite_the_weights_are_the_optimizer_s_alone(case, value):
    kind, options = case
    model = make_model()
    optimizer = sgd(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    method = kind(model, optimizer, scaler=scaler, **options)
    state = str(method.state_dict()) if kind not in (methods.MeZO,) else None
    method.step(lambda batch: loss_fn_of(model)(batch) * value, make_batches(2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert scaler.get_scale() == 1.0
    if kind not in (methods.MeZO, methods.RWP, methods.ARWP, methods.MixedRWP, methods.LPFSGD):
        assert str(method.state_dict()) == state


@pytest.mark.parametrize("kind", [methods.LoRA, methods.SAM, methods.LoRASAM, methods.FMLoRA])
def test_an_optimizer_that_steps_in_hooks_is_an_error(kind):
    model = make_model()
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters() if p.requires_grad}

    def step(p):
        inner[p].step()
        p.grad = None

    method = kind(model, sgd(model))
    handles = [p.register_post_accumulate_grad_hook(step) for p in inner]
    with pytest.raises(RuntimeError, match="written during a backward, by an optimizer"):
        method.step(loss_fn_of(model), make_batches(2))
    for handle in handles:
        handle.remove()
    method.step(loss_fn_of(model), make_batches(2))


def test_an_optimizer_in_backward_is_refused():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    _apply_optimizer_in_backward(torch.optim.SGD, trained, {"lr": 0.1})
    for kind in (methods.SAM, methods.RWP):
        with pytest.raises(ValueError, match="optimizer must step after the backwards alone"):
            kind(model, sgd(model))


def test_weights_that_a_forward_writes_are_fine():
    # An embedding with max_norm does.
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 1))
    methods.LoRA(model, sgd(model)).step(loss_fn_of(model), [torch.tensor([1, 2])])
