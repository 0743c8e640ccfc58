"""What faults strike: training steps of small models, and what must hold behind each."""

import functools
import itertools
import logging
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import flatkern
from bench.reliability.injectors import Injector
from flatkern import methods
from flatkern.nn import replace_linear
from flatkern.noise import registry

# float64 has no CPU kernels; its residuals are the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESTORES = ("residual", "snapshot", "host")
SCOPES = ("merged", "all", "full", "trainable")
WORKS = ("window", "batches", "paused", "open", "saved", "two windows")
# Whole runs of transformers' Trainer and of Lightning's.
TRAINERS = ("trainer", "lightning")
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
