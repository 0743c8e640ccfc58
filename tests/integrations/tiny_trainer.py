"""transformers' Trainer on the tiny models: short runs with accumulation and a short last group."""

from every_method import EVERY
from tiny import tokens
from transformers import Trainer, TrainingArguments

from flatkern.integrations.peft import attach

SIGMA = 0.3
ACCUMULATION = 3
EXAMPLES = 16  # 8 micro-batches of 2: groups of 3, 3 and 2
MODES = ("virtual", "inplace")


def dataset(count=EXAMPLES):
    data = tokens(count)
    return [{name: value[i] for name, value in data.items()} for i in range(count)]


def flat_lora(model, *args, **kwargs):
    """The method's noise is that of layers, which PEFT's are once attached."""
    attach(model)
    return EVERY["FlatLoRA"](model, *args, **kwargs)


PEFT_METHODS = {**EVERY, "FlatLoRA": flat_lora}


def trainer_of(folder, model, flat=None, callbacks=(), kind=Trainer, **options):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 4,
    } | options
    trainer = kind(
        model=model,
        args=TrainingArguments(str(folder), **options),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        callbacks=list(callbacks),
    )
    if flat is not None:
        flat.add_to(trainer)
    return trainer


def batches_of(trainer):
    """A list that gets every micro-batch as the Trainer collates it."""
    order = []
    collate = trainer.data_collator

    def noted(examples):
        order.append(collate(examples))
        return order[-1]

    trainer.data_collator = noted
    return order


def is_base(name):
    return "lora_" not in name


def items(trainer, group):
    """The tokens of a step's micro-batches as the Trainer counts them, which versions differ in."""
    return trainer.get_batch_samples(iter(group), len(group), trainer.args.device)[1]


def steps_by_hand(method, model, trainer, order, sizes):
    """Losses of the method's steps on what the Trainer saw, in groups of these sizes."""
    losses = []
    for size in sizes:
        group, order = order[:size], order[size:]
        # The mean over the tokens of all micro-batches, as the Trainer takes it.
        count = items(trainer, group)

        def loss_fn(batch, count=count, size=size):
            return model(**batch, num_items_in_batch=count).loss * size

        losses.append(method.step(loss_fn, group))
    return losses
