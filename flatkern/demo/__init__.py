"""`flatkern demo`: fine-tunes a pretrained transformer on real sentences, with and without noise.

A small encoder learns the sentiment of film-review sentences from 256 examples, with some of the
labels wrong or with none wrong, by LoRA, by Flat-LoRA and by LoRA with dropout.
"""


class DemoError(RuntimeError):
    """Something the demo needs is missing or damaged; the message says what to do."""
