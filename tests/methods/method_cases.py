"""A small model for the methods, and every method with the options that its tests need."""

from dataclasses import dataclass, field

import pytest
import tolerances
import torch
from torch import nn

import flatkern
from flatkern import methods

# Methods about A and B themselves.
PAIRED = (methods.BAR, methods.FMLoRA, methods.LoRAPro)


@dataclass(frozen=True)
class Case:
    """One method with options.

    quiet: options under which it is plain training, bit for bit; None if there are none.
    splits: whether one batch and its parts as micro-batches give the same step.
    backward: whether it calls backward at all.
    """

    type: type
    options: dict = field(default_factory=dict)
    quiet: dict | None = None
    splits: bool = True
    backward: bool = True

    @property
    def adapters(self):
        """Whether it needs LoRA layers."""
        by_type = issubclass(self.type, (methods.LoRASAM, methods.FMLoRA, *PAIRED))
        flat = self.type is methods.FlatLoRA
        return by_type or flat or self.options.get("scope") == "merged"

    def __call__(self, model, optimizer, **options):
        return self.type(model, optimizer, **{**self.options, **options})

    def __str__(self):
        return "-".join([self.type.__name__, *map(str, self.options.values())])


CASES = [
    Case(methods.LoRA, quiet={}),
    Case(methods.FlatLoRA, quiet={"sigma": 0.0}),
    Case(methods.FlatLoRA, {"mode": "inplace"}, {"sigma": 0.0}),
    Case(methods.SAM, quiet={"rho": 0.0}),
    Case(methods.SAM, {"norm": "per_tensor"}, {"rho": 0.0}),
    Case(methods.SAM, {"scope": "merged"}, {"rho": 0.0}),
    Case(methods.ASAM, quiet={"rho": 0.0}),
    Case(methods.ASAM, {"preset": "davda54"}, {"rho": 0.0}),
    Case(methods.LoRASAM, {"rho": 0.05}, {"rho": 0.0}),
    Case(methods.BAR, quiet={"alpha": 0.0}),
    Case(methods.BAR, {"variant": "oBAR"}, {"alpha": 0.0}),
    Case(methods.FMLoRA, quiet={"rho": 0.0}),
    Case(methods.FMLoRA, {"norm": "joint"}, {"rho": 0.0}),
    Case(methods.EFMLoRA, quiet={"rho": 0.0}),
    Case(methods.RWP, {"sigma": 0.1}, {"sigma": 0.0}),
    Case(methods.RWP, {"sigma": 0.1, "scope": "full", "strategy": "element"}, {"sigma": 0.0}),
    Case(methods.LPFSGD, {"sigma": 0.1}, {"sigma": 0.0}, splits=False),
    Case(methods.MixedRWP, {"sigma": 0.1, "split": "last"}, {"lam": 0.0}, splits=False),
    Case(methods.MixedRWP, {"strategy": "fisher", "sigma": 0.1, "lam": 1.0}, splits=False),
    Case(methods.ARWP, {"sigma": 0.1}, {"sigma": 0.0}),
    Case(methods.ARWP, {"sigma": 0.1, "scope": "merged"}, {"sigma": 0.0}),
    Case(methods.MeZO, {"mu": 0.01}, backward=False),
    Case(methods.SAM, {"ascents": 3}, {"rho": 0.0}),
    Case(methods.SAM, {"scope": "merged", "ascents": 2}, {"rho": 0.0}),
    Case(methods.GSAM, quiet={"rho": 0.0, "alpha": 0.0}),
    Case(methods.FriendlySAM, quiet={"rho": 0.0}),
    Case(methods.GAM, {"alpha": 0.5}, {"alpha": 0.0}),
    Case(methods.FMLoRA, {"transfer": "A"}, {"rho": 0.0}),
    Case(methods.EFMLoRA, {"transfer": "A"}, {"rho": 0.0}),
    Case(
        methods.MixedRWP,
        {"sigma": 0.1, "a": 1.0, "b": 0.5, "split": "last"},
        {"b": 0.0},
        splits=False,
    ),
    Case(methods.GMP, {"sigma": 0.1}, {"lam": 0.0}),
    Case(methods.SmoothOut, {"sigma": 0.1}, {"sigma": 0.0}),
    Case(methods.SmoothOut, {"sigma": 0.1, "strategy": "row"}, {"sigma": 0.0}),
    Case(methods.NoisyTune, quiet={"lam": 0.0}),
    Case(methods.EntropySGD, {"inner_steps": 3, "inner_lr": 0.02}),
    Case(methods.LoRAPro),
    Case(methods.ES, {"sigma": 0.01, "population": 4}, backward=False),
    Case(methods.ES, {"population": 2, "fitness": "zscore", "sigma": 0.05}, backward=False),
]


def cases(condition=lambda case: True):
    chosen = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", chosen, ids=str)


every_case = cases()


def make_model(dtype=torch.float32, **kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    flatkern.nn.replace_linear(model, "all-linear", r=2, init_lora_weights=False, **kind)
    return model


def trainable(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def sgd(model, lr=0.1):
    return torch.optim.SGD(trainable(model), lr=lr)


def make_batches(count, dtype=torch.float32, rows=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator, dtype=dtype) for _ in range(count)]


def loss_fn_of(model):
    return lambda batch: model(batch).square().mean()


def copies(model):
    """Every parameter's bits, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_parameters(model, expected):
    for name, value in expected.items():
        tolerances.assert_same_bits(model.get_parameter(name), value)


def assert_left_clean(model, before):
    assert all(weight.grad is None for weight in model.parameters())
    assert_parameters(model, before)


def step_gradients(case, model, batches, loss_fn=None, **options):
    """The gradients that the optimizer sees in one step, by name, and the step's loss.

    Of the outputs' mean square, unless there is a loss of its own.
    """
    optimizer = sgd(model, lr=0.0)
    seen = {}

    def look(*_):
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                seen[name] = weight.grad.clone()

    hook = optimizer.register_step_pre_hook(look)
    loss = case(model, optimizer, **options).step(loss_fn or loss_fn_of(model), batches)
    hook.remove()
    return seen, loss
