"""Flat-LoRA on MiniLM with PEFT and Trainer: movie reviews, 30 % of the training labels flipped.

python examples/peft_trainer.py [sigma]  # model and sentences: those of `make demo`
"""

import sys
import tempfile

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from flatkern.demo import data
from flatkern.demo.model import model_folder
from flatkern.integrations.transformers import FlatLoRACallback


def train(texts, labels, test_texts, test_labels, sigma=0.3, **arguments):
    """Fine-tune; return the accuracy on the test sentences and the trainer."""
    transformers.set_seed(0)
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True
    )
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    )

    def examples(texts, labels):
        tokens = tokenizer(list(texts), truncation=True, max_length=32, padding="max_length")
        return [
            {"labels": int(label), **{name: values[i] for name, values in tokens.items()}}
            for i, label in enumerate(labels)
        ]

    with tempfile.TemporaryDirectory() as output:
        settings = {"per_device_train_batch_size": 32, "num_train_epochs": 6, "learning_rate": 2e-3}
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(output, report_to=[], **settings | arguments),
            train_dataset=examples(texts, labels),
        )
        FlatLoRACallback(sigma=sigma, seed=0).add_to(trainer)
        trainer.train()
        scores = torch.from_numpy(trainer.predict(examples(test_texts, test_labels)).predictions)
    return (scores.argmax(1).numpy() == np.asarray(test_labels)).mean(), trainer


if __name__ == "__main__":
    movies = data.load_sentences()[data.IN_DOMAIN]
    splits = data.split(movies.labels, test=400, validation=400)
    rows, labels = data.draw_training_set(movies.labels, splits.pool, 256, flipped=0.3, seed=0)
    test = movies.take(splits.test)
    sigma = float(sys.argv[1]) if len(sys.argv) > 1 else 0.3
    right, _ = train(movies.take(rows).texts, labels, test.texts, test.labels, sigma)
    print(f"sigma {sigma:g}: {right:.1%} of {len(test.texts)} test sentences right")
