"""DiagnosticsCallback in the Trainer's and Lightning's log, beside FlatLoRACallback."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tiny import adapted, bits, same_bits, tokens
from tiny_trainer import SIGMA, trainer_of
from transformers import TrainerCallback

from flatkern.integrations.diagnostics.transformers import DiagnosticsCallback
from flatkern.integrations.peft import attach, detach
from flatkern.integrations.transformers import FlatLoRACallback
from flatkern.landscape import average_flatness
from flatkern.landscape.diagnostics import adapter_figures

FIGURES = {"balancedness", "condition_A", "condition_A_max", "noise_to_weight", "noise_BA_to_W"}
FLATNESS = {"flatness", "flatness_low", "flatness_high"}


def held_out(model):
    return model(**tokens(seed=77)).loss


class Reporter(TrainerCallback):
    """Stands for TensorBoard and W&B: sees the log, and the weights at that time."""

    def __init__(self):
        self.logs, self.expected = [], {}

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        self.logs.append(dict(logs))
        if "loss" in logs:
            attached = any("_flatkern_site" in vars(m) for m in model.modules())
            if not attached:
                attach(model)
            self.expected[state.global_step] = adapter_figures(model, sigma=SIGMA)
            rises = average_flatness(model, lambda: held_out(model), sigma=SIGMA, draws=2)
            self.expected[state.global_step]["flatness"] = float(rises)
            if not attached:
                detach(model)


@pytest.mark.parametrize("with_noise", [True, False], ids=["flat", "plain"])
def test_the_trainers_log(tmp_path, with_noise):
    options = {"num_train_epochs": 2, "eval_strategy": "epoch", "logging_steps": 1}
    quiet = trainer_of(tmp_path, adapted(), callbacks=flat_of(with_noise), **options)
    quiet.train()
    reporter = Reporter()
    own = DiagnosticsCallback(SIGMA, loss_fn=held_out, flatness_every=2, draws=2)
    callbacks = [reporter, own, *flat_of(with_noise)]
    trainer = trainer_of(tmp_path, adapted(), callbacks=callbacks, **options)
    trainer.train()
    # The training keeps its bits, and PEFT's model is as it was.
    assert same_bits(bits(trainer.model), bits(quiet.model))
    assert not any("_flatkern_site" in vars(m) for m in trainer.model.modules())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6
    for entry in logged:
        expected = reporter.expected[entry["step"]]
        assert entry.keys() >= FIGURES
        # Logged at every second step: the first at 2.
        assert (entry.keys() >= FLATNESS) == (entry["step"] % 2 == 0)
        for name in FIGURES | (FLATNESS & entry.keys()) - {"flatness_low", "flatness_high"}:
            assert entry[name] == expected[name], name
        if "flatness" in entry:
            assert entry["flatness_low"] < entry["flatness"] < entry["flatness_high"]
    # Those that report see what the history has.
    assert [log for log in reporter.logs if "loss" in log] == [
        {name: value for name, value in entry.items() if name != "step"} for entry in logged
    ]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    for entry in evaluated:
        before = [e["loss"] for e in logged if e["step"] <= entry["step"]][-1]
        assert entry["gap"] == pytest.approx(entry["eval_loss"] - before)


def flat_of(with_noise):
    return [FlatLoRACallback(sigma=SIGMA, seed=5)] if with_noise else []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sigma": "a"}, TypeError, "sigma"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable"),
        ({"flatness_every": 2}, ValueError, "loss_fn must be given"),
        ({"flatness_every": -1}, ValueError, "flatness_every"),
        ({"prefix": 1}, TypeError, "prefix"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        DiagnosticsCallback(**options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightnings_log(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger
    from torch import nn
    from torch.utils.data import DataLoader

    from flatkern.integrations.diagnostics import lightning
    from flatkern.integrations.lightning import FlatLoRACallback as Flat
    from flatkern.nn import replace_linear

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
            replace_linear(self.model, "all-linear", r=2)

        def loss(self, batch):
            return (self.model(batch) - batch).square().mean()

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    held = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    trained = []
    for diagnose in (True, False):
        own = lightning.DiagnosticsCallback(
            SIGMA, loss_fn=lambda module: module.loss(held), flatness_every=2, draws=2
        )
        trainer = Trainer(
            callbacks=[Flat(sigma=SIGMA, seed=5), *([own] if diagnose else [])],
            logger=CSVLogger(tmp_path, name=str(diagnose)),
            accumulate_grad_batches=2,
            log_every_n_steps=1,
            max_epochs=1,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        module = Module()
        trainer.fit(module, *(DataLoader(part, batch_size=None) for part in (data, data[:2])))
        trained.append(bits(module))
    assert same_bits(*trained)
    (file,) = Path(tmp_path, "True").glob("*/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    logged = [row for row in rows if row.get("balancedness")]
    assert len(logged) == 4
    assert all(row[name] for row in logged for name in FIGURES)
    measured = [row for row in rows if row.get("flatness")]
    assert [int(row["step"]) for row in measured] == [2, 4]
    assert all(row[name] for row in measured for name in FLATNESS)
    assert sum(bool(row.get("gap")) for row in rows) == 1
