"""Which forwards of a training run see the noise."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft import LoraConfig
from tiny import adapted, bits, fill, same_bits, tokens
from tiny_trainer import SIGMA, dataset, trainer_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from flatkern.integrations._forwards import TrainingForwards
from flatkern.integrations.peft import attach, detach
from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin
from flatkern.methods import FlatLoRA

MODES = pytest.mark.parametrize("mode", ["virtual", "inplace"])
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def with_reference(**options):
    model = adapted(**options)
    model.add_adapter("ref", CONFIG)
    fill(model, seed=7)
    return model


def of_reference(model):
    """The loss of the other adapter, as TRL computes a reference's."""
    model.set_adapter("ref")
    with torch.no_grad():
        loss = model(**tokens()).loss
    model.set_adapter("default")
    return loss


@pytest.fixture
def hooked(request):
    """A PEFT model with hooks, its noise, and its clean loss."""
    made = []

    def make(mode, **options):
        model = with_reference()
        noise = attach(model, SIGMA, mode=mode)
        forwards = TrainingForwards(lambda: noise, **options)
        forwards.add(model)
        made.append((model, forwards))
        return model, noise, forwards

    yield make
    for model, forwards in made:
        forwards.remove()
        hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(),)]
        assert not any(getattr(hook, "__self__", None) is forwards for hook in hooks)
        detach(model)


def losses(model):
    """By every way in, without gradients."""
    base = model.get_base_model()
    with torch.no_grad():
        whole = model(**tokens()).loss
        inner = base(**tokens()).loss
        backbone = base.model(input_ids=tokens()["input_ids"]).last_hidden_state
    with torch.inference_mode():
        inferred = model(**tokens()).loss
    text = model.generate(tokens()["input_ids"], max_new_tokens=2, do_sample=False)
    return [of_reference(model), whole, inner, backbone, inferred.clone(), text]


@MODES
def test_forwards_without_gradients_are_clean(hooked, mode):
    model, noise, _ = hooked(mode)
    clean, trained = losses(model), model(**tokens()).loss
    with noise.window():
        noisy = model(**tokens()).loss
        assert not torch.equal(noisy, trained)
        for one, other in zip(losses(model), clean, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(model(**tokens()).loss, noisy)


@MODES
def test_noise_without_grad(hooked, mode):
    model, noise, _ = hooked(mode, without_grad=True)
    clean = losses(model)[:4]
    with noise.window():
        for one, other in zip(losses(model)[:4], clean, strict=True):
            assert not torch.equal(one, other)
        # A model in eval mode stays clean.
        model.eval()
        assert torch.equal(model(**tokens()).loss, clean[1])
        model.train()


@MODES
def test_the_policys_graph_outlives_the_reference(hooked, mode):
    model, noise, _ = hooked(mode)
    reference = of_reference(model)

    def gradients(between):
        with noise.window(step=1):
            loss = model(**tokens()).loss
            if between:
                assert torch.equal(of_reference(model), reference)
            loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads

    alone, beside = gradients(False), gradients(True)
    assert alone
    assert same_bits(alone, beside)


@MODES
def test_a_late_backward_still_raises(hooked, mode):
    model, noise, _ = hooked(mode)
    before = bits(model)
    with noise.window():
        loss = model(**tokens()).loss
        of_reference(model)
    with pytest.raises(RuntimeError):
        loss.backward()
    assert same_bits(bits(model), before)


@MODES
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_keeps_the_noise(hooked, mode, reentrant, whole):
    model, noise, _ = hooked(mode)
    base = model.get_base_model()
    hidden = base.get_input_embeddings()(tokens()["input_ids"]).detach().requires_grad_()

    def loss(hidden):
        return base(inputs_embeds=hidden, labels=tokens()["labels"]).loss

    def gradients(wrapped):
        with noise.window(step=1):
            value = wrapped()
            value.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        # Reentrant checkpointing computes the loss without gradients, and the gradients again.
        grads["loss"] = value.detach()
        model.zero_grad()
        return grads

    plain = gradients(lambda: loss(hidden))
    if whole:
        again = gradients(lambda: checkpoint(loss, hidden, use_reentrant=reentrant))
    else:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients(lambda: loss(hidden))
        base.gradient_checkpointing_disable()
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7)


@MODES
def test_a_reference_inside_the_models_own_forward(mode):
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = with_reference()

        def forward(self):
            return self.net(**tokens()).loss, of_reference(self.net)

    model = Distilled()
    clean = model()[1]
    noise = attach(model, SIGMA, mode=mode)
    forwards = TrainingForwards(lambda: noise)
    forwards.add(model)
    with noise.window():
        noisy, reference = model()
        assert torch.equal(reference, clean)
        noisy.backward()
    forwards.remove()


def test_an_interrupted_forward_leaves_nothing_behind(hooked):
    model, noise, forwards = hooked("inplace")
    stop = []

    def fail(*args):
        if stop:
            raise stop.pop()

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    clean = of_reference(model)
    with noise.window():
        noisy = model(**tokens()).loss
        for error in (ValueError, KeyboardInterrupt):
            stop.append(error)
            with pytest.raises(error):
                of_reference(model)
            forwards.leave()
            model.set_adapter("default")
            assert torch.equal(model(**tokens()).loss, noisy)
    assert torch.equal(of_reference(model), clean)
    handle.remove()


def test_a_copy_has_no_part_in_it(hooked):
    model, noise, _ = hooked("virtual")
    twin = copy.deepcopy(model)
    with noise.window():
        noisy = model(**tokens()).loss
        with torch.no_grad():
            twin(**tokens())
        assert torch.equal(model(**tokens()).loss, noisy)


class Preferring(Trainer):
    """As TRL's DPOTrainer with an adapter as the reference, which comes after the policy."""

    def __init__(self, *args, **kwargs):
        self.references = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.references.append(of_reference(self.model).item())
        return loss


@MODES
@pytest.mark.parametrize("noise_without_grad", [False, True])
def test_the_reference_of_a_trainer(tmp_path, mode, noise_without_grad):
    model = with_reference()
    clean = of_reference(model).item()
    before = bits(model, lambda name: "lora_" not in name)
    flat = FlatLoRACallback(
        sigma=SIGMA, mode=mode, schedule="constant", noise_without_grad=noise_without_grad
    )
    options = {"num_train_epochs": 1}
    trainer = trainer_of(tmp_path, model, flat, kind=Preferring, **options)
    if mode == "inplace" and noise_without_grad:
        trainer.args.max_steps = 1
    trainer.train()
    assert trainer.references
    same = [reference == clean for reference in trainer.references]
    assert not any(same) if noise_without_grad else all(same)
    assert same_bits(bits(model, lambda name: "lora_" not in name), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("noise_without_grad", [False, True])
def test_the_reference_of_a_method(tmp_path, noise_without_grad):
    class Both(MethodTrainerMixin, Preferring):
        pass

    model = with_reference()
    clean = of_reference(model).item()
    attach(model)
    trainer = trainer_of(
        tmp_path,
        model,
        kind=lambda **kwargs: Both(
            method=lambda *args, **more: FlatLoRA(*args, sigma=SIGMA, **more),
            noise_without_grad=noise_without_grad,
            **kwargs,
        ),
        num_train_epochs=1,
    )
    trainer.train()
    same = [reference == clean for reference in trainer.references]
    assert same
    assert not any(same) if noise_without_grad else all(same)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("how", "backend"), [("torch_compile", "aot_eager"), ("in place", "eager")]
)
def test_compiled_runs_log_the_same_figures(tmp_path, how, backend):
    def figures(compiled):
        torch.compiler.reset()
        model = with_reference(layers=1)
        options = {"max_steps": 2, "gradient_accumulation_steps": 1}
        if compiled and how == "torch_compile":
            options |= {"torch_compile": True, "torch_compile_backend": backend}
        elif compiled:
            model.compile(backend=backend)
        flat = FlatLoRACallback(sigma=SIGMA, schedule="constant")
        kind = Trainer if compiled else Preferring
        trainer = trainer_of(tmp_path, model, flat, kind=kind, **options)
        trainer.train()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [[e[k] for k in ("loss", "noise_sigma", "noise_loss_rise")] for e in history]

    plain, compiled = figures(False), figures(True)
    assert len(compiled) == 2
    for one, other in zip(plain, compiled, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)


def test_misspelt_options_of_a_method(tmp_path):
    import functools

    class Both(MethodTrainerMixin, Trainer):
        pass

    def make(**options):
        Both(
            model=adapted(),
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=dataset(),
            method=functools.partial(FlatLoRA, **options),
        )

    make(sigma=0.1, seed=3, max_grad_norm=1.0)
    with pytest.raises(TypeError, match="FlatLoRA: unknown keyword sgima; did you mean sigma"):
        make(sgima=0.1)
