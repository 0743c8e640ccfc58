"""Faults at any point of a training step, and what must hold behind each.

    python -m bench.reliability.faults --faults 10000 --seed 0

Each fault strikes a step of one `Case` at a point drawn at random: a line of flatkern's files, an
op before or behind it, a moment in time. Behind it the base weights have their exact bits, the
adapters too unless the optimizer had begun, and no window, hook, attribute, thread, mode or
generator is left; the same step run again gives, bit for bit, what the run without a fault gave.
Prints one line for each kind of fault, and what broke; ends with 1 if something did.
"""

import argparse
import functools
import itertools
import logging
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import flatkern
from bench.reliability.injectors import ERRORS, NEVER, Injector, Lines, Ops, Timer
from flatkern import _backend, methods
from flatkern.nn import replace_linear
from flatkern.noise import registry

# float64 has no CPU kernels; its residuals are the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESTORES = ("residual", "snapshot", "host")
SCOPES = ("merged", "all", "full", "trainable")
WORKS = ("window", "batches", "paused", "open", "saved", "two windows")
# Whole runs of transformers' Trainer and of Lightning's.
TRAINERS = ("trainer", "lightning")
INJECTORS = ("line", "op", "behind an op", "moment")
METHODS = {
    "FlatLoRA": {},
    "SAM": {},
    "ASAM": {},
    "LoRASAM": {"rho": 0.05},
    "BAR": {},
    "FMLoRA": {},
    "EFMLoRA": {},
    "RWP": {"sigma": 0.1},
    "LPFSGD": {"sigma": 0.1},
    "MixedRWP": {"sigma": 0.1, "split": "last"},
    "ARWP": {"sigma": 0.1, "scope": "merged"},
    "MeZO": {"mu": 0.01},
    "GSAM": {},
    "FriendlySAM": {},
    "GAM": {"alpha": 0.5},
    "GMP": {"sigma": 0.1},
    "SmoothOut": {"sigma": 0.1},
    "NoisyTune": {},
    "EntropySGD": {"inner_steps": 2, "inner_lr": 0.02},
    "LoRAPro": {},
    "ES": {"sigma": 0.01, "population": 2},
}


class Case(NamedTuple):
    """What is done in the step that a fault strikes: windows by hand, or a method's step."""

    dtype: torch.dtype
    mode: str = "virtual"
    restore: str = "residual"
    scope: str = "merged"
    work: str = "window"
    method: str | None = None
    layers: str = "own"


def cases() -> list[Case]:
    """Windows over dtypes, modes, restores and scopes; methods; PEFT's layers; two Trainers."""
    modes = ("virtual", "inplace")
    kinds = itertools.product(DTYPES, modes, RESTORES, SCOPES, WORKS)
    windows = [Case(*kind) for kind in kinds]
    kinds = itertools.product(DTYPES[:2], modes, RESTORES[:2], SCOPES[:3], WORKS)
    windows += [Case(*kind, layers="peft") for kind in kinds]
    kinds = itertools.product(DTYPES[:2], SCOPES[:2], WORKS)
    windows += [Case(d, scope=s, work=w, layers="quantised") for d, s, w in kinds]
    kinds = itertools.product(modes, RESTORES, ("peft", "quantised"))
    kinds = [kind for kind in kinds if kind[0] == "virtual" or kind[2] == "peft"]
    windows += [Case(DTYPES[0], m, r, work="trainer", layers=kind) for m, r, kind in kinds]
    kinds = itertools.product(modes, RESTORES, ("own", "peft"))
    windows += [Case(DTYPES[0], m, r, work="lightning", layers=kind) for m, r, kind in kinds]
    steps = [Case(dtype, method=name) for name in METHODS for dtype in DTYPES[:2]]
    for name in METHODS:
        steps.append(Case(torch.float32, method=name, layers="peft"))
        steps.append(Case(torch.float32, work="trainer", method=name, layers="peft"))
        steps.append(Case(torch.float32, work="lightning", method=name))
    return windows + steps


class Layers(nn.Sequential):
    """A model for loops by hand, and for a Trainer, which wants the loss."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if labels is None else {"loss": (y - labels).float().square().mean()}


def make_model(case: Case) -> nn.Module:
    model = Layers(
        nn.LayerNorm(12), nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 120), nn.Linear(120, 5)
    ).to(case.dtype)
    names = ["1", "3", "4"]
    if case.layers == "own":
        replace_linear(model, names, r=2, init_lora_weights=False)
        return model
    from peft import LoraConfig, inject_adapter_in_model

    from flatkern.integrations.peft import attach

    if case.layers == "quantised":
        from bitsandbytes.nn import Linear4bit

        for name in names:
            linear = getattr(model, name)
            rows, cols = linear.weight.shape
            layer = Linear4bit(cols, rows, compute_dtype=case.dtype, quant_type="nf4")
            layer.load_state_dict(linear.state_dict())
            layer.bias = linear.bias  # which bitsandbytes would cast
            setattr(model, name, layer.to("cpu").requires_grad_(False))
        model.is_loaded_in_4bit = True  # what PEFT goes by
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(case.dtype)
    if case.work not in TRAINERS or case.method is not None:  # a callback attaches by itself
        attach(model)
    return model


class Subject:
    """A model with its noise or method and its optimizer, and what it was before the step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        model = make_model(case)
        if case.scope == "trainable":
            model[1].weight.requires_grad_(True)
        self.model = model
        self.x = [torch.randn(4, 12).to(case.dtype) for _ in range(2)]
        self.optimizer = self.new_optimizer()
        self.stepping = False
        self.noise = self.method = None
        if case.work in TRAINERS:
            self.owners = []
        elif case.method is None:
            options = {"mode": case.mode, "restore": case.restore, "scope": case.scope}
            parts = [model[:3], model[3:]] if case.work == "two windows" else [model]
            self.owners = [flatkern.WeightNoise(part, 0.2, seed=7, **options) for part in parts]
            self.noise = self.owners[0]
        else:
            kind = getattr(methods, case.method)
            self.method = kind(model, self.optimizer, **METHODS[case.method])
            self.owners = [self.method]
        self.remembered = [owner.state_dict() for owner in self.owners]
        self.before = {name: w.detach().clone() for name, w in model.named_parameters()}
        if case.work in TRAINERS:
            self.run()  # Trainers leave a mark of their own on a model.
        self.attributes = {m: (set(vars(m)), _hooks(m)) for m in model.modules()}
        self.expected = self.run()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """One without a memory, which tells when it steps."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.05)
        optimizer.register_step_pre_hook(self._note_step)
        return optimizer

    def _note_step(self, *_: Any) -> None:
        self.stepping = True

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch).float().square().mean()

    def step(self) -> None:
        """Forwards and backwards in a window, then the optimizer."""
        if self.case.work in TRAINERS:
            self.train() if self.case.work == "trainer" else self.fit()
            return
        if self.method is not None:
            self.method.step(self.loss, self.x)
            return
        noise, work = self.noise, self.case.work
        if work == "open":
            noise.open()
            try:
                self.loss(self.x[0]).backward()
            finally:
                noise.close()
        elif work == "two windows":
            with noise.window(), self.owners[1].window():
                self.loss(self.x[0]).backward()
        else:
            with noise.window(micro_batches=2):
                self.loss(self.x[0]).backward()
                if work == "batches":
                    self.loss(self.x[1]).backward()
                elif work == "paused":
                    with noise.paused(), torch.no_grad():
                        self.loss(self.x[1])
                    self.loss(self.x[1]).backward()
                elif work == "saved":
                    state = self.model.state_dict()
                    for name in self.before:  # of quantised weights there is more
                        value = state[name]
                        require(_same(value, self.before[name]), f"state_dict of {name} is noisy")
        self.optimizer.step()

    def train(self) -> None:
        """Two steps of two micro-batches in a Trainer, made for them."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin

        case = self.case
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_train_epochs=1,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            )
            examples = [{"x": x, "labels": torch.zeros(5)} for x in torch.cat(self.x)]
            options = {"model": self.model, "args": arguments, "train_dataset": examples}
            options["optimizers"] = self.new_optimizer(), None
            if case.method is None:
                trainer = Trainer(**options)
                FlatLoRACallback(
                    0.2, seed=7, mode=case.mode, restore=case.restore, schedule="constant"
                ).add_to(trainer)
            else:
                kind = type("MethodTrainer", (MethodTrainerMixin, Trainer), {})
                method = functools.partial(getattr(methods, case.method), **METHODS[case.method])
                trainer = kind(**options, method=method)
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def fit(self) -> None:
        """Two steps of a micro-batch each in Lightning's Trainer, a method's by hand."""
        from lightning.pytorch import LightningModule, Trainer

        from flatkern.integrations.lightning import FlatLoRACallback

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        subject, case = self, self.case

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = subject.model
                self.automatic_optimization = case.method is None

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return subject.new_optimizer()

            def train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(torch.cat(subject.x), batch_size=4)

            def on_train_start(self) -> None:
                if case.method is not None:
                    kind = getattr(methods, case.method)
                    optimizer = self.optimizers().optimizer
                    self.method = kind(self.model, optimizer, **METHODS[case.method])

            def training_step(self, batch: Tensor, index: int) -> Tensor | None:
                if case.method is None:
                    return subject.loss(batch)
                self.method.step(subject.loss, [batch])
                return None

        callbacks = []
        if case.method is None:
            options = {"mode": case.mode, "restore": case.restore, "schedule": "constant"}
            callbacks.append(FlatLoRACallback(0.2, seed=7, **options))
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module())

    def reset(self) -> None:
        """The values, gradients and memory of before the step; nothing else is mended."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.before[name])
        self.optimizer.zero_grad()
        self.stepping = False
        for owner, remembered in zip(self.owners, self.remembered, strict=True):
            owner.load_state_dict(remembered)

    def run(self) -> dict[str, Tensor]:
        """The weights behind a whole step; ends as before it."""
        self.reset()
        self.step()
        after = {name: w.detach().clone() for name, w in self.model.named_parameters()}
        self.reset()
        return after

    def strike(self, injector: Injector) -> BaseException | None:
        """One step with the fault; returns what came out of it."""
        try:
            with injector:
                self.step()
        except BaseException as error:  # whatever it is, the program goes on
            return error
        return None

    def check(self) -> None:
        """AssertionError unless everything that must hold does, and the next step is right."""
        model = self.model
        if self.noise is not None and self.case.work == "open":
            # Nothing closes a window whose `close` never began, or was not reached.
            flatkern.close(model)
        if self.noise is not None:
            require(not any(noise.active for noise in self.owners), "a window is open")
        for name, weight in model.named_parameters():
            if not self.stepping or ("lora_" not in name and not weight.requires_grad):
                require(_same(weight, self.before[name]), f"{name} is not what it was")
        for module, (attributes, hooks) in self.attributes.items():
            extra = set(vars(module)) ^ attributes
            require(not extra, f"attributes of {type(module).__name__}: {extra}")
            require(_hooks(module) == hooks, f"a hook on {type(module).__name__}")
            require(getattr(module, "_window", None) is None, "a layer in a window")
        require(not _global_optimizer_post_hooks, "a hook on all optimizers")
        require(not list(registry._OPEN), "a window is registered")
        after = self.run()
        for name, value in after.items():
            require(_same(value, self.expected[name]), f"{name} of the next step is another")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _hooks(module: nn.Module) -> list[int]:
    names = (name for name in vars(module) if name.endswith("_hooks"))
    return [len(getattr(module, name)) for name in sorted(names)]


def _same(one: Tensor, other: Tensor) -> bool:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.detach().view(integers), other.view(integers))


def process_state() -> dict[str, Any]:
    """What a step must leave alone in the process."""
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "python's generator": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "saved tensors' hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "torch's threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "threads": threading.active_count(),
        "backend": _backend.named(),
        "trace": sys.gettrace(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "hooks of all modules": len(torch_module._global_forward_hooks),
    }


# By every Trainer, at its start.
SEEDED = ("torch's generator", "python's generator")


def make_injector(kind: str, at: int, error: Callable[[], BaseException]) -> Injector:
    if kind == "line":
        return Lines(at, error)
    if kind == "moment":
        return Timer(at, error)
    return Ops(at, error, behind=kind == "behind an op")


class Finding(NamedTuple):
    """A fault behind which something did not hold."""

    case: Case
    kind: str
    at: int
    error: str
    what: str


class Harness:
    """Strikes cases, with subjects that are made once and again behind a finding."""

    def __init__(self) -> None:
        self._subjects: dict[Case, Subject] = {}
        self._points: dict[tuple[Case, str], int] = {}

    def points(self, case: Case, kind: str) -> int:
        """How many points of that kind a step of the case has (microseconds: of a moment)."""
        if (case, kind) not in self._points:
            subject = self._subject(case)
            injector = make_injector(kind, NEVER, RuntimeError)
            start = time.perf_counter()
            error = subject.strike(injector)
            if error is not None:
                raise error
            passed = injector.passed
            if kind == "moment":
                passed = int(1e6 * (time.perf_counter() - start))
            subject.reset()
            self._points[case, kind] = passed
        return self._points[case, kind]

    def _subject(self, case: Case) -> Subject:
        if case not in self._subjects:
            self._subjects[case] = Subject(case)
        return self._subjects[case]

    def strike(self, case: Case, kind: str, at: int, error: str) -> tuple[str, Finding | None]:
        """One fault: what became of it, and what it broke."""
        subject = self._subject(case)
        before = process_state()
        injector = make_injector(kind, at, ERRORS[error])
        came = subject.strike(injector)
        del came
        outcome = "raised" if injector.struck else "not reached"
        try:
            now = process_state()
            for name, value in now.items():
                if name not in SEEDED or case.work not in TRAINERS:
                    require(value == before[name], f"{name}: {str(value)[:80]}")
            subject.check()
        except Exception as failure:  # a finding, whatever it is
            del self._subjects[case]
            _sweep(subject)
            what = "".join(traceback.format_exception_only(failure)).strip()
            return outcome, Finding(case, kind, at, error, what)
        return outcome, None


def _sweep(subject: Subject) -> None:
    """Let what a finding left behind not be found again."""
    for noise in list(registry._OPEN):
        noise.discard()
        registry.unregister(noise)
    torch.set_grad_enabled(True)
    _backend._named = "auto"


def draw(faults: int, seed: int, chosen: list[Case], harness: Harness) -> Iterator[tuple]:
    """(case, kind, at, error) of each: cases in turn, the rest by chance."""
    chance = random.Random(seed)
    order = chosen[:]
    chance.shuffle(order)
    for number in range(faults):
        case = order[number % len(order)]
        kind = INJECTORS[number // len(order) % len(INJECTORS)]
        errors = [e for e in ERRORS if kind != "moment" or e in ("KeyboardInterrupt", "SystemExit")]
        yield case, kind, chance.randint(1, harness.points(case, kind)), chance.choice(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default="", help="only cases whose text has this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [case for case in cases() if options.cases in str(case)]
    harness, counts, findings = Harness(), Counter(), []
    start = time.time()
    for case, kind, at, error in draw(options.faults, options.seed, chosen, harness):
        outcome, finding = harness.strike(case, kind, at, error)
        counts[kind, outcome] += 1
        if finding is not None:
            findings.append(finding)
            print(f"FOUND {finding}", flush=True)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:>14} {outcome:>12} {count:6}")
    minutes = (time.time() - start) / 60
    print(f"{options.faults} faults, {len(chosen)} cases, seed {options.seed}, {minutes:.1f} min")
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
