"""Lightning: which forwards see the noise, compiled modules, and the callback's options."""

import inspect

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.loggers import CSVLogger
from test_lightning import ACCUMULATION, MODES, SIGMA, Module, network, trainer_of

import flatkern
from flatkern.integrations.lightning import FlatLoRACallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Preferring(Module):
    """Notes what a forward without gradients gives, by the module and by a part of it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.references, self.noisy = [], []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first = self.model[0]
        with torch.no_grad():
            probe = torch.ones(1, 8)
            self.references.append((first(probe), self.model[3](first(probe))))
            mode, self.model[2].p = self.model[2].p, 0.0
            self.references[-1] += (self(probe), self.model(probe))
            self.model[2].p = mode
        self.noisy.append(not torch.equal(first(probe).detach(), self.references[-1][0]))
        return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noise_without_grad", [False, True])
def test_a_reference_inside_the_training_step(tmp_path, mode, noise_without_grad):
    flat = FlatLoRACallback(
        SIGMA, mode=mode, schedule="constant", noise_without_grad=noise_without_grad
    )
    module = Preferring(flat=flat)
    probe, model = torch.ones(1, 8), network().eval()
    with torch.no_grad():
        clean = model[0](probe), model[3](model[0](probe)), model(probe), model(probe)
    trainer_of(tmp_path, flat, max_steps=1).fit(module)
    # Before the first update: a whole group of micro-batches.
    assert len(module.references) == ACCUMULATION
    for found in module.references:
        same = [torch.equal(one, other) for one, other in zip(found, clean, strict=True)]
        assert not any(same) if noise_without_grad else all(same)
    # The training forward beside it.
    assert module.noisy == [not noise_without_grad] * ACCUMULATION
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_parts_in_eval_mode_are_trained_with_noise(tmp_path):
    seen = []

    class Frozen(Module):
        def training_step(self, batch, batch_idx):
            self.model.eval()
            with self.flat.noise.paused():
                clean = self.model(batch).detach()
            seen.append(not torch.equal(self.model(batch).detach(), clean))
            return self.loss(batch)

    flat = FlatLoRACallback(SIGMA, schedule="constant")
    trainer_of(tmp_path, flat, max_steps=1).fit(Frozen(flat=flat))
    assert seen
    assert all(seen)


def test_compiled_modules_log_the_same_figures(tmp_path):
    def figures(folder, wrap):
        torch.compiler.reset()
        logger = CSVLogger(str(folder), version=0)
        flat = FlatLoRACallback(SIGMA, schedule="constant", measure=True)
        module = Module()
        module.model[2].p = 0.0
        logged, made = [], flat._figures
        flat._figures = lambda: logged.append(made()) or logged[-1]
        module.model = wrap(module.model)
        trainer_of(folder, flat, max_steps=2, logger=logger).fit(module)
        return logged

    plain = figures(tmp_path / "plain", lambda model: model)
    compiled = figures(
        tmp_path / "compiled", lambda model: torch.compile(model, backend="aot_eager")
    )
    assert len(plain) == len(compiled) == 2
    for one, other in zip(plain, compiled, strict=True):
        assert one["noise_loss_rise"] != 0
        assert one == pytest.approx(other, rel=1e-4)


def test_options():
    with pytest.raises(TypeError, match="FlatLoRACallback: unknown keyword shedule; did you mean"):
        FlatLoRACallback(shedule="constant")
    with pytest.raises(ValueError, match="FlatLoRACallback: mode must be"):
        FlatLoRACallback(mode="place")
    parameters = inspect.signature(FlatLoRACallback).parameters
    assert inspect.signature(flatkern.WeightNoise).parameters.keys() - parameters <= {"model"}
