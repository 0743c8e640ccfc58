"""FlatLoRACallback under the real Trainer: clean weights, files and evaluations; exact resume."""

import inspect

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft import LoraConfig
from safetensors.torch import load_file
from tiny import adapted, bits, llama, same_bits, tokens
from tiny_trainer import (
    ACCUMULATION,
    MODES,
    SIGMA,
    batches_of,
    dataset,
    is_base,
    items,
    trainer_of,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import flatkern
from flatkern.integrations.peft import attach
from flatkern.integrations.transformers import FlatLoRACallback, MethodTrainerMixin
from flatkern.methods import SAM
from flatkern.nn import replace_linear


class Spy(TrainerCallback):
    """What the callbacks that come after see."""

    def __init__(self, flat):
        self.flat = flat
        self.events, self.logs = [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.note("substep", state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.note("optimizer", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.note("evaluate", state)

    def on_save(self, args, state, control, **kwargs):
        self.note("save", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def note(self, event, state):
        self.events.append((event, state.global_step, self.flat.noise.active))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_weights_are_exact_and_windows_follow_the_steps(tmp_path, mode, dtype):
    model = adapted(dtype=dtype)
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, seed=5, mode=mode, schedule="constant")
    spy = Spy(flat)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, model, flat, [spy], **options)
    trainer.train()
    step = [("optimizer", False), ("evaluate", False), ("save", False)]
    groups = [[("substep", True)] * (size - 1) + step for size in (3, 3, 2)] * 2
    expected = [
        (event, number + (event in ("evaluate", "save")), active)
        for number, group in enumerate(groups)
        for event, active in group
    ]
    assert spy.events == expected
    assert same_bits(bits(model, is_base), before)
    assert flat.noise is None
    assert not any("_flatkern_site" in module.__dict__ for module in model.modules())


def test_training_is_the_plain_loop(tmp_path):
    flat = FlatLoRACallback(sigma=SIGMA, seed=5)
    kept = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                kept["grads"] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
                kept["after"] = bits(model)

    model = adapted()
    options = {"max_grad_norm": 0.0, "num_train_epochs": 1}
    trainer = trainer_of(tmp_path, model, flat, [Gradients()], **options)
    order = batches_of(trainer)
    trainer.train()
    # Step 1 of 3, by hand: the noise of a cosine ramp over three steps at step 1.
    twin = adapted()
    twin.load_state_dict(kept["after"], strict=False)
    noise = attach(twin, SIGMA, seed=5, schedule=flatkern.cosine_ramp(3))
    count = items(trainer, order[3:6])
    with noise.window(step=1):
        for batch in order[3:6]:
            twin(**batch, num_items_in_batch=count).loss.backward()
    grads = [p.grad for p in twin.parameters() if p.requires_grad]
    for one, other in zip(kept["grads"], grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_resume_gives_the_same_bits(tmp_path, mode):
    def run(folder, **train):
        config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
        model = adapted(config)
        flat = FlatLoRACallback(sigma=SIGMA, seed=5, mode=mode)
        options = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
        trainer = trainer_of(folder, model, flat, **options)
        trainer.train(**train)
        return bits(model), trainer.state.global_step

    whole, steps = run(tmp_path)
    # Step 4 of 6 is inside the second epoch.
    resumed, again = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps == again == 6
    assert same_bits(resumed, whole)


def test_evaluation_and_files_are_clean_inside_a_window(tmp_path):
    seen = {}

    class Meddler(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            if seen or state.global_step < 1:
                return
            noisy = model(**tokens()).loss
            seen["inside"] = flat.noise.active
            seen["metrics"] = trainer.evaluate()["eval_loss"]
            with flat.noise.paused():
                seen["clean"] = trainer.evaluate()["eval_loss"]
            model.eval()
            seen["generated"] = model.generate(tokens()["input_ids"], max_new_tokens=3)
            with flat.noise.paused():
                seen["by_hand"] = model.generate(tokens()["input_ids"], max_new_tokens=3)
            model.train()
            seen["again"] = torch.equal(model(**tokens()).loss, noisy)
            seen["weights"] = bits(model)
            trainer.save_model(str(tmp_path / "inside"))

    flat = FlatLoRACallback(sigma=1.0, schedule="constant")
    model = adapted()
    trainer = trainer_of(tmp_path, model, flat, [Meddler()], per_device_eval_batch_size=4)
    trainer.train()
    assert seen["inside"]
    assert seen["again"]
    assert seen["metrics"] == seen["clean"]
    assert torch.equal(seen["generated"], seen["by_hand"])
    saved = load_file(tmp_path / "inside" / "adapter_model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(value, seen["weights"][name.replace(".weight", ".default.weight")])


@pytest.mark.parametrize("added", [True, False])
def test_a_just_in_time_checkpoint_is_clean(tmp_path, added):
    # It is written in on_pre_optimizer_step, before callbacks that do not put themselves first.
    model = llama()
    flat = FlatLoRACallback(sigma=SIGMA, scope="trainable", mode="inplace", schedule="constant")
    options = {"enable_jit_checkpoint": True, "max_steps": 3}
    trainer = trainer_of(
        tmp_path, model, flat if added else None, [] if added else [flat], **options
    )
    jit = next(
        cb for cb in trainer.callback_handler.callbacks if isinstance(cb, JITCheckpointCallback)
    )
    clean = bits(model)
    noisy = []
    save = trainer._save_checkpoint

    def noted(*args, **kwargs):
        noisy.append(not same_bits(bits(model), clean))
        return save(*args, **kwargs)

    trainer._save_checkpoint = noted

    class Signal(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            jit.jit_manager.is_checkpoint_requested = True

    trainer.add_callback(Signal())
    trainer.train()
    assert noisy == [False]
    saved = load_file(tmp_path / "checkpoint-0" / "model.safetensors")
    assert all(torch.equal(value, clean[name]) for name, value in saved.items())


@pytest.mark.parametrize("mode", MODES)
def test_an_out_of_memory_retry_starts_clean(tmp_path, mode):
    class Failing(Trainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if len(inputs["input_ids"]) > 2:
                assert flat.noise.active
                raise RuntimeError("CUDA out of memory.")
            return loss

    model = adapted()
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path, model, flat, kind=Failing, **options)
    trainer.train()
    assert trainer.state.train_batch_size <= 2
    assert same_bits(bits(model, is_base), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(tmp_path, mode, kind):
    class Failing(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise kind

    model = adapted()
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    trainer = trainer_of(tmp_path, model, flat, [Failing()])
    with pytest.raises(kind):
        trainer.train()
    assert same_bits(bits(model, is_base), before)
    assert flat.noise is None
    attach(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_one_of_callbacks_cleans_up_as_well(tmp_path, mode, kind):
    class Failing(TrainerCallback):
        failed = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise kind

    model = adapted()
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    failing = Failing()
    trainer = trainer_of(tmp_path, model, callbacks=[flat, failing])
    with pytest.raises(kind):
        trainer.train()
    assert flat.noise is None
    assert same_bits(bits(model, is_base), before)
    # A new trainer of the same model, with a callback of its own, and then the first one again.
    other = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    trainer_of(tmp_path, model, callbacks=[other], max_steps=2).train()
    trainer.train()
    assert trainer.state.global_step == 6
    assert same_bits(bits(model, is_base), before)
    attach(model)


@pytest.mark.parametrize("where", ["substep", "epoch"])
def test_an_early_stop_closes_the_window(tmp_path, where):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = where == "substep" and state.global_step == 1

    model = adapted()
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode="inplace", schedule="constant")
    options = {"save_strategy": "epoch"}
    spy = Spy(flat)
    callbacks = [Stop(), spy]
    if where == "epoch":
        callbacks = [EarlyStoppingCallback(1, early_stopping_threshold=100.0)]
        options |= {
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "num_train_epochs": 5,
        }
    trainer = trainer_of(tmp_path, model, flat, callbacks, **options)
    trainer.train()
    assert trainer.state.global_step < trainer.state.max_steps
    if where == "substep":
        assert spy.events[-1] == ("save", 1, False)
    assert same_bits(bits(model, is_base), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_the_scaler_skips_restores_as_well(tmp_path, mode):
    # The optimizer's own hooks never fire then.
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).grad.fill_(torch.inf)

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            skipped.append(optimizer.step_was_skipped)

    skipped = []
    model = adapted()
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode=mode, schedule="constant")
    # A fused optimizer would look at the scaler itself.
    options = {"num_train_epochs": 1, "max_grad_norm": 0, "optim": "adamw_torch"}
    trainer = trainer_of(tmp_path, model, flat, [Overflow()], **options)
    # accelerate makes one only where there is a GPU.
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert skipped == [False, True, False]
    assert scaler.get_scale() == 2.0
    assert same_bits(bits(model, is_base), before)


@pytest.mark.parametrize(("accumulation", "writes"), [(1, False), (ACCUMULATION, True)])
def test_auto_goes_by_the_accumulation(tmp_path, accumulation, writes):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            written.append(not same_bits(bits(model, is_base), before))

    written = []
    model = llama()
    replace_linear(model, ["q_proj", "v_proj"], r=4)
    before = bits(model, is_base)
    flat = FlatLoRACallback(sigma=SIGMA, mode="auto", schedule="constant")
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    trainer_of(tmp_path, model, flat, [Look()], **options).train()
    if "cpu" not in flatkern.available_backends("cpu"):
        writes = False  # There is no kernel for the residual.
    assert written == [writes] * 2
    assert same_bits(bits(model, is_base), before)


@pytest.mark.parametrize("how", ["add_to", "callbacks", "add_callback"])
def test_sigma_is_logged_for_every_reporter(tmp_path, how):
    flat = FlatLoRACallback(sigma=SIGMA)
    # Reporters come before the callbacks that a user passes.
    spy = Spy(flat)
    added, listed = flat if how == "add_to" else None, [flat] if how == "callbacks" else []
    trainer = trainer_of(tmp_path, adapted(), added, [spy, *listed])
    if how == "add_callback":
        trainer.add_callback(flat)
    trainer.train()
    sigmas = [logs["noise_sigma"] for logs in spy.logs if "loss" in logs]
    schedule = flatkern.cosine_ramp(6)
    assert sigmas == [SIGMA * schedule(step) for step in range(6)]
    kept = [entry["noise_sigma"] for entry in trainer.state.log_history if "loss" in entry]
    assert kept == sigmas


def test_lora_linear_needs_no_peft(tmp_path):
    model = llama()
    replace_linear(model, ["q_proj", "v_proj"], r=4)
    before = bits(model, is_base)
    trainer = trainer_of(tmp_path, model, FlatLoRACallback(sigma=SIGMA, schedule="lpf"))
    trainer.train()
    assert same_bits(bits(model, is_base), before)
    assert trainer.state.log_history[0]["noise_sigma"] == SIGMA


def test_a_method_and_the_callback_are_refused(tmp_path):
    class Both(MethodTrainerMixin, Trainer):
        pass

    def trainer(callbacks=()):
        return Both(
            model=adapted(),
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=dataset(),
            callbacks=list(callbacks),
            method=SAM,
        )

    with pytest.raises(RuntimeError, match="not both"):
        trainer([FlatLoRACallback()])
    plain = trainer()
    with pytest.raises(RuntimeError, match="not both"):
        FlatLoRACallback().add_to(plain)
    plain.add_callback(FlatLoRACallback())
    with pytest.raises(RuntimeError, match="not both"):
        plain.train()


WRONG = [
    ({"mode": "inplce"}, ValueError, "FlatLoRACallback: mode must be 'virtual' or"),
    ({"restore": "disk"}, ValueError, "FlatLoRACallback: restore must be 'residual' or"),
    ({"strategy": "flat"}, ValueError, "FlatLoRACallback: strategy must be"),
    ({"strategy": "fisher"}, ValueError, "FlatLoRACallback: fisher must be given"),
    ({"scope": "merge"}, ValueError, "FlatLoRACallback: scope must be"),
    ({"ranks": "all"}, ValueError, "FlatLoRACallback: ranks must be"),
    ({"seed": -1}, ValueError, "seed"),
    ({"measure": 1}, TypeError, "FlatLoRACallback: measure must be bool"),
    ({"noise_without_grad": 1}, TypeError, "FlatLoRACallback: noise_without_grad must be bool"),
    (
        {"sgima": 0.1},
        TypeError,
        r"^FlatLoRACallback: unknown keyword sgima; did you mean sigma\?$",
    ),
    ({"total": 3}, TypeError, "FlatLoRACallback: unknown keyword total; accepted are sigma, strat"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG, ids=str)
def test_wrong_options_are_refused_when_the_callback_is_made(options, error, text):
    with pytest.raises(error, match=text):
        FlatLoRACallback(**options)


@pytest.mark.parametrize("function", [FlatLoRACallback, attach], ids=["callback", "attach"])
def test_editors_see_the_options(function):
    parameters = inspect.signature(function).parameters.values()
    names = {parameter.name for parameter in parameters}
    assert inspect.signature(flatkern.WeightNoise).parameters.keys() - names <= {"model"}
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="schedule"):
        FlatLoRACallback(schedule="cosine")
    with pytest.raises(ValueError, match="sigma"):
        FlatLoRACallback(-0.1)
    with pytest.raises(TypeError, match="trainer"):
        FlatLoRACallback().add_to("trainer")


def test_a_trainer_takes_one(tmp_path):
    trainer = trainer_of(tmp_path, adapted(), FlatLoRACallback())
    with pytest.raises(RuntimeError, match="one already"):
        FlatLoRACallback().add_to(trainer)
