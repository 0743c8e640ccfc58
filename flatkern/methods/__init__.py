"""Training methods: each runs one optimizer step, forwards and backwards included."""

from flatkern.methods.base import Method
from flatkern.methods.flat_lora import FlatLoRA
from flatkern.methods.lora import LoRA

__all__ = ["FlatLoRA", "LoRA", "Method"]
