"""One cell: build the arm's model, train it, measure everything that the study reports."""

import base64
import copy
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatkern
from flatkern import landscape
from flatkern.demo.experiment import (
    BATCH,
    FrozenWeights,
    batch_loss,
    method_named,
    train_epochs,
)
from flatkern.study import tasks
from flatkern.study.arms import LABELS, PLAIN, STOPPED, Arm, Cell

FLATNESS = {"sigma": 0.2, "draws": 4, "ascent_steps": 2, "seed": 777}
EVALUATION_BATCH = 128
GA_BATCHES, PLUS_RATIO, ORTHOGONAL = 4, 4.0, 0.1


def run(cell: Cell, quick: bool) -> list[dict[str, Any]]:
    """Train one cell; plain LoRA's also gives the cell of early stopping.

    One thread and a seeded generator: the same bits every time on one machine.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    task = tasks.load(cell.task, quick)
    training = task.train(cell.seed, LABELS[cell.labels])
    epochs = task.epochs[cell.labels]
    steps = epochs * -(-len(training.labels) // BATCH)
    model, method, loss_fn = build(task, cell.arm, cell.seed, training, steps)
    frozen = FrozenWeights(model)
    curve, best = [], None
    for _, ended in train_epochs(model, method, training, epochs, cell.seed, loss_fn):
        # What early stopping watches; of the other arms only the end is of interest.
        if ended and cell.arm.name == PLAIN:
            curve.append(_figures(*predict(model, task.validation))["accuracy"])
            if best is None or curve[-1] > best[0]:
                best = (curve[-1], copy.deepcopy(model.state_dict()))

    def measured(name: str, value: str) -> dict[str, Any]:
        row = {
            "key": Cell(cell.task, cell.labels, cell.seed, Arm(name, value)).key,
            "task": cell.task,
            "labels": cell.labels,
            "seed": cell.seed,
            "arm": name,
            "value": value,
            "weights_changed": frozen.changed(),
            "validation": _figures(*predict(model, task.validation)),
            "train": _figures(*predict(model, training)),
            "tests": {},
            "predictions": {},
        }
        for test, examples in task.tests.items():
            logits, labels = predict(model, examples)
            row["tests"][test] = _figures(logits, labels)
            row["predictions"][test] = pack(logits.argmax(1))
        row["flatness"] = flatness(model, task, cell.arm)
        return row

    rows = [measured(cell.arm.name, cell.arm.value)]
    if best is not None:
        rows[0]["curve"] = curve
        model.load_state_dict(best[1])
        rows.append(measured(STOPPED, ""))
    for row in rows:
        row["seconds"] = round(time.perf_counter() - start, 1)
    return rows


def build(
    task: tasks.Task, arm: Arm, seed: int, training: Any, steps: int
) -> tuple[nn.Module, flatkern.methods.Method, Callable[[Any], Tensor]]:
    """A fresh model of the arm, its method, and the loss of a batch."""
    torch.manual_seed(seed)
    model = task.fresh()
    for weight in model.encoder.parameters():
        weight.requires_grad_(arm.start == "full")

    loss_fn = batch_loss(model)
    if arm.start == "adalora":
        return _adalora(model, arm, seed, steps, loss_fn)
    if arm.start != "full":
        _adapt(model, arm)
        if arm.start == "lora_ga":
            batches = training.batches(BATCH)[:GA_BATCHES]
            flatkern.nn.lora_ga_init(model, loss_fn, batches)
    return model, _method(model, arm, seed), loss_fn


def _adapt(model: nn.Module, arm: Arm) -> None:
    flatkern.nn.replace_linear(
        model.encoder,
        "all-linear",
        r=arm.rank,
        lora_alpha=2 * arm.rank,
        lora_dropout=arm.dropout,
        init_lora_weights="pissa" if arm.start == "pissa" else True,
        layer=flatkern.nn.DoRALinear if arm.start == "dora" else flatkern.nn.LoRALinear,
    )


def _method(model: nn.Module, arm: Arm, seed: int) -> flatkern.methods.Method:
    trainable: list = [weight for weight in model.parameters() if weight.requires_grad]
    if arm.start == "lora_plus":
        trainable = flatkern.nn.lora_plus_groups(model, arm.lr, PLUS_RATIO)
    optimizer = torch.optim.AdamW(trainable, lr=arm.lr)
    return method_named(arm.method, model, optimizer, arm.options, seed)


def _adalora(
    model: nn.Module, arm: Arm, seed: int, steps: int, plain_loss: Callable[[Any], Tensor]
) -> tuple[nn.Module, flatkern.methods.Method, Callable[[Any], Tensor]]:
    """PEFT's AdaLoRA: ranks 12 on average at first, 8 in the end."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    from flatkern.integrations import peft

    linear = [name for name, part in model.encoder.named_modules() if isinstance(part, nn.Linear)]
    config = AdaLoraConfig(
        target_modules=linear,
        init_r=3 * arm.rank // 2,
        target_r=arm.rank,
        lora_alpha=2 * arm.rank,
        lora_dropout=0.0,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 20),
        total_step=steps,
    )
    model.encoder = adapted = AdaLoraModel(model.encoder, {"default": config}, "default")
    factors = [
        weight
        for name, weight in adapted.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    peft.attach(model)
    method = _method(model, arm, seed)
    done = iter(range(1, steps + 1))
    # After the optimizer and before the gradients are cleared, as AdaLoRA asks for.
    method.optimizer.register_step_post_hook(lambda *_: adapted.update_and_allocate(next(done)))

    def loss_fn(batch: Any) -> Tensor:
        """With PEFT's penalty on factors that are not orthogonal."""
        products = (f @ f.T if f.shape[0] < f.shape[1] else f.T @ f for f in factors)
        excess = [torch.linalg.norm(product - torch.eye(len(product))) for product in products]
        return plain_loss(batch) + ORTHOGONAL * torch.stack(excess).mean()

    return model, method, loss_fn


@torch.no_grad()
def predict(model: nn.Module, examples: Any) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] in eval mode, and labels, both in the examples' order of batches."""
    model.eval()
    pairs = [(model(*inputs), labels) for *inputs, labels in examples.batches(EVALUATION_BATCH)]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 in percent, and the mean loss in nats."""
    found = logits.argmax(1)
    return {
        "accuracy": round(100 * float((found == labels).double().mean()), 3),
        "f1": round(100 * float(f1_score(labels, found, average="macro")), 3),
        "loss": round(float(cross_entropy(logits, labels)), 5),
    }


def flatness(model: nn.Module, task: tasks.Task, arm: Arm) -> dict[str, float]:
    """How much the loss of held-out examples rises around the merged weights of all linear layers.

    Weights that were fine-tuned whole are looked at as the base of an adapter that is zero: the
    same layers, and the same draws.
    """
    if arm.start == "full":
        model = copy.deepcopy(model)
        _adapt(model, Arm(PLAIN))
    batches = task.held_out.batches(EVALUATION_BATCH)
    count = len(task.held_out.labels)

    def loss() -> Tensor:
        losses = [
            cross_entropy(model(*inputs), labels, reduction="sum") for *inputs, labels in batches
        ]
        return torch.stack(losses).sum() / count

    found = landscape.worst_flatness(model, loss, **FLATNESS)
    return {
        "average": float(found.losses.mean()) - found.plain,
        "sampled": found.sampled,
        "ascent": found.ascent,
        "loss": found.plain,
    }


def pack(classes: Tensor) -> str:
    """Predicted classes as text: base64 of zlib of a byte for each."""
    return base64.b64encode(zlib.compress(classes.to(torch.uint8).numpy().tobytes(), 9)).decode()


def unpack(packed: str) -> np.ndarray:
    """The classes that `pack` packed, uint8 [n]."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
