"""FlatLoRACallback under the real Lightning Trainer: clean weights and files; exact resume."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")

from every_method import EVERY
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import flatkern
from flatkern.integrations.galore import galore_adamw
from flatkern.integrations.lightning import FlatLoRACallback
from flatkern.nn import replace_linear

SIGMA = 0.3
ACCUMULATION = 3
BATCHES = 8  # Groups of 3, 3 and 2.
EPOCHS = 2
MODES = ("virtual", "inplace")
# About loaders without workers and a logger that is not there.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen(values):
    return {name: value for name, value in values.items() if "lora_" not in name}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))
    replace_linear(model, ["0", "3"], r=2, lora_alpha=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


class Module(LightningModule):
    """Regression, and a record of what every forward saw."""

    def __init__(self, flat=None, model=None):
        super().__init__()
        self.model = network() if model is None else model
        self.flat = flat
        self.events = []

    def loss(self, batch):
        return (self.model(batch) - batch).square().mean()

    def training_step(self, batch, batch_idx):
        self.note("train")
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.note("validate")
        self.log("val_loss", self.loss(batch))

    def on_before_optimizer_step(self, optimizer):
        self.note("optimizer")

    def note(self, event):
        noise = None if self.flat is None else self.flat.noise
        active = None if noise is None else noise.active
        self.events.append((event, self.trainer.global_step, active))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        optimizer.register_step_pre_hook(lambda *args: self.note("hook"))
        return optimizer

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data(BATCHES * 2), batch_size=2)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(data(2), batch_size=2)


def data(rows):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(3))


def trainer_of(folder, *callbacks, **options):
    options = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATION,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    } | options
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **options)


def fit(folder, flat, *callbacks, module=None, ckpt_path=None, **options):
    module = module or Module(flat)
    trainer = trainer_of(folder, *([] if flat is None else [flat]), *callbacks, **options)
    seed_everything(7, verbose=False)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("mode", MODES)
def test_base_weights_are_exact_and_windows_follow_the_steps(tmp_path, mode):
    flat = FlatLoRACallback(sigma=SIGMA, seed=5, mode=mode, schedule="constant")
    module = Module(flat)
    before = frozen(bits(module))
    trainer, _ = fit(tmp_path, flat, module=module)
    # First Lightning's sanity check of the validation, before there is any noise.
    expected = [("validate", 0, None)]
    step = 0
    for _ in range(EPOCHS):
        for size in (3, 3, 2):
            # Lightning runs forward and backward in the optimizer's closure: after its own hooks.
            expected += [("train", step, True)] * (size - 1)
            expected += [("hook", step, True), ("train", step, True), ("optimizer", step, False)]
            step += 1
        expected.append(("validate", step, False))
    assert module.events == expected
    assert trainer.global_step == step
    assert same_bits(frozen(bits(module)), before)
    assert flat.noise is None


def test_training_is_the_plain_loop(tmp_path):
    flat = FlatLoRACallback(sigma=SIGMA, seed=5)
    _, module = fit(tmp_path, flat, limit_val_batches=0, gradient_clip_val=0.5)
    twin = network()
    seed_everything(7, verbose=False)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    noise = flatkern.WeightNoise(twin, SIGMA, seed=5, schedule=flatkern.cosine_ramp(EPOCHS * 3))
    for _ in range(EPOCHS):
        batches = iter(Module.train_dataloader(None))
        for size in (3, 3, 2):
            with noise.window():
                for _ in range(size):
                    batch = next(batches)
                    ((twin(batch) - batch).square().mean() / ACCUMULATION).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert same_bits(bits(module.model), bits(twin))


@pytest.mark.parametrize("mode", MODES)
def test_resume_gives_the_same_bits(tmp_path, mode):
    def run(folder, *callbacks, **options):
        flat = FlatLoRACallback(sigma=SIGMA, seed=5, mode=mode)
        module = Module(flat)
        module.model[2].p = 0.0  # Lightning does not save the generators' states.
        trainer, _ = fit(folder, flat, *callbacks, module=module, max_epochs=3, **options)
        return bits(module), trainer.global_step

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, steps = run(tmp_path, keep, enable_checkpointing=True)
    resumed, again = run(tmp_path / "again", ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert steps == again == 9
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("mode", MODES)
def test_validation_and_files_are_clean_inside_a_window(tmp_path, mode):
    seen = {}

    class Meddler(Callback):
        def on_validation_start(self, trainer, module):
            if flat.noise is None or not flat.noise.active or seen:
                return
            seen["step"] = trainer.global_step
            batch = data(2)
            with torch.no_grad():
                seen["validated"] = module.loss(batch)
                with flat.noise.paused():
                    seen["clean"] = module.loss(batch)
            trainer.save_checkpoint(tmp_path / "inside.ckpt")
            seen["weights"] = {k: v.clone() for k, v in twin_of(module).items()}

        def on_validation_end(self, trainer, module):
            if "step" in seen and "noisy" not in seen:
                # Without gradients it would be clean.
                with torch.inference_mode(False), torch.enable_grad():
                    seen["noisy"] = module.loss(data(2)).detach()

    def twin_of(module):
        with flat.noise.paused():
            return bits(module)

    flat = FlatLoRACallback(sigma=1.0, schedule="constant", mode=mode)
    # After every second batch: the first of them is in the middle of a step.
    fit(tmp_path, flat, Meddler(), val_check_interval=2)
    assert seen["step"] == 0
    assert torch.equal(seen["validated"], seen["clean"])
    assert not torch.equal(seen["noisy"], seen["clean"])
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    assert same_bits(saved, seen["weights"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "raised"), [(ValueError, ValueError), (KeyboardInterrupt, SystemExit)]
)
def test_an_exception_leaves_the_model_as_it_was(tmp_path, mode, kind, raised):
    class Failing(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 1:
                assert flat.noise.active
                raise kind

    flat = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    module = Module(flat)
    before = frozen(bits(module))
    with pytest.raises(raised):
        fit(tmp_path, flat, Failing(), module=module)
    assert same_bits(frozen(bits(module)), before)
    assert flat.noise is None
    flatkern.WeightNoise(module).open()


def test_an_epoch_that_ends_early_closes_the_window(tmp_path):
    class Short(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 4 else None

        def on_train_epoch_end(self):
            self.note("epoch")

    flat = FlatLoRACallback(sigma=SIGMA, mode="inplace", schedule="constant")
    module = Short(flat)
    fit(tmp_path, flat, module=module)
    assert [event for event in module.events if event[0] == "epoch"] == [
        ("epoch", 1, False),
        ("epoch", 2, False),
    ]


def test_a_step_that_the_scaler_skips_is_closed_as_well(tmp_path):
    # The optimizer's own hooks never fire then.
    from lightning.pytorch.plugins import MixedPrecision

    class Overflow(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 1:
                module.model[0].lora_A.grad.fill_(torch.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    flat = FlatLoRACallback(sigma=SIGMA, mode="inplace", schedule="constant")
    module = Module(flat)
    before = frozen(bits(module))
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(tmp_path, flat, Overflow(), module=module, plugins=[plugin])
    assert scaler.get_scale() == 2.0
    assert all(not active for event, _, active in module.events if event == "optimizer")
    assert same_bits(frozen(bits(module)), before)


def logged(folder, *callbacks, dropout=0.2, **options):
    """What the logger got where there is noise, and the module."""
    flat = FlatLoRACallback(**{"sigma": SIGMA, "seed": 5} | options)
    logger = CSVLogger(folder)
    module = Module(flat)
    module.model[2].p = dropout
    fit(folder, flat, *callbacks, module=module, logger=logger, log_every_n_steps=2)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "noise_sigma" in row], module


def test_figures_are_logged_and_change_nothing(tmp_path):
    rows, module = logged(tmp_path / "with", measure=True)
    schedule = flatkern.cosine_ramp(6)
    sigmas = [SIGMA * schedule(step) for step in (1, 3, 5)]
    assert [row["noise_sigma"] for row in rows] == pytest.approx(sigmas)
    assert all(row["noise_loss_rise"] != 0 for row in rows)
    plain, other = logged(tmp_path / "without")
    assert [row["train_loss"] for row in plain] == [row["train_loss"] for row in rows]
    assert not any("noise_loss_rise" in row for row in plain)
    assert same_bits(bits(module), bits(other))


@pytest.mark.parametrize("mode", MODES)
def test_the_rise_is_that_of_the_first_micro_batch(tmp_path, mode):
    kept = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3 and batch_idx == 0:
                kept.append((bits(module.model), batch))

    rows, _ = logged(
        tmp_path, Keep(), dropout=0.0, measure=True, schedule="constant", mode="virtual"
    )
    (weights, batch), twin = kept[0], network()
    twin.load_state_dict(weights)
    twin[2].p = 0.0
    losses = []
    noise = flatkern.WeightNoise(twin, SIGMA, seed=5, mode=mode)
    with torch.no_grad():
        losses.append((twin(batch) - batch).square().mean())
        with noise.window(step=3):
            losses.append((twin(batch) - batch).square().mean())
    assert rows[1]["noise_loss_rise"] == pytest.approx((losses[1] - losses[0]).item(), rel=1e-5)


def test_the_rise_has_the_same_dropout_on_both_sides(tmp_path):
    rows, _ = logged(tmp_path, sigma=0.0, measure=True)
    assert [row["noise_loss_rise"] for row in rows] == [0, 0, 0]


def test_peft_layers_are_attached_and_detached(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    module = Module(FlatLoRACallback(sigma=SIGMA, mode="inplace", schedule="constant"), model)
    before = frozen(bits(module))
    fit(tmp_path, module.flat, module=module)
    assert ("train", 1, True) in module.events
    assert same_bits(frozen(bits(module)), before)
    assert not any("_flatkern_site" in part.__dict__ for part in module.modules())


def test_what_gives_no_windows_is_refused(tmp_path):
    class Manual(Module):
        automatic_optimization = False

    with pytest.raises(ValueError, match="automatic_optimization"):
        fit(tmp_path, FlatLoRACallback(), module=Manual(), accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="number of steps is not known"):
        fit(tmp_path, FlatLoRACallback(), max_epochs=-1)
    with pytest.raises(ValueError, match="schedule"):
        FlatLoRACallback(schedule="cosine")
    with pytest.raises(TypeError, match="measure"):
        FlatLoRACallback(measure=1)


class ByMethod(Module):
    """Manual optimization, where a method makes the passes of a step."""

    def __init__(self, make):
        super().__init__()
        self.make, self.automatic_optimization = make, False

    def on_train_start(self):
        self.method = self.make(self.model, self.optimizers().optimizer)

    def training_step(self, batch, batch_idx):
        self.method.step(self.loss, [batch])


@pytest.mark.parametrize("name", EVERY)
def test_a_method_makes_the_steps_of_manual_optimization(tmp_path, name):
    make = EVERY[name]
    module, twin = ByMethod(make), network()
    # Lightning draws from the generator that dropout draws from.
    module.model[2].p = twin[2].p = 0.0
    fit(tmp_path, None, module=module, accumulate_grad_batches=1, max_epochs=1)
    trained = [p for p in twin.parameters() if p.requires_grad]
    method = make(twin, torch.optim.AdamW(trained, lr=1e-2))
    for batch in data(BATCHES * 2).split(2):
        method.step(lambda x: (twin(x) - x).square().mean(), [batch])
    assert same_bits(bits(module.model), bits(twin))
    assert same_bits(frozen(bits(twin)), frozen(bits(network())))


def test_galore_takes_the_steps_of_manual_optimization(tmp_path):
    pytest.importorskip("pytorch_optimizer")

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    class ByGaLore(ByMethod):
        def configure_optimizers(self):
            return galore_adamw(self.model, lr=1e-2, rank=4)

    module, twin = ByGaLore(EVERY["GSAM"]), plain()
    module.model = plain()
    fit(tmp_path, None, module=module, accumulate_grad_batches=1, max_epochs=1)
    method = EVERY["GSAM"](twin, galore_adamw(twin, lr=1e-2, rank=4))
    for batch in data(BATCHES * 2).split(2):
        method.step(lambda x: (twin(x) - x).square().mean(), [batch])
    assert same_bits(bits(module.model), bits(twin))
    assert not same_bits(bits(twin), bits(plain()))


# The scaler is the method's, and every method's in test_accelerate.py.
@pytest.mark.parametrize("name", ["GSAM", "SmoothOut", "LoRAPro"])
def test_a_method_takes_a_scaler_under_autocast(tmp_path, name):
    from lightning.pytorch.plugins import MixedPrecision

    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=4.0)):
        module = ByMethod(partial(EVERY[name], scaler=scaler))
        module.model[2].p = 0.0
        # Autocast is the same on both sides; a power of two changes no bit.
        options = {"plugins": [MixedPrecision("bf16-mixed", "cpu")], "max_epochs": 1}
        fit(tmp_path, None, module=module, accumulate_grad_batches=1, **options)
        found.append(bits(module.model))
    assert same_bits(*found)
