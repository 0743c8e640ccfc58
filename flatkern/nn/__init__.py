"""LoRA layers that can be seen through noise, and how they get into a model and out again."""

from flatkern.nn.adapter import load_adapter, save_adapter
from flatkern.nn.linear import LoRALinear
from flatkern.nn.replace import replace_linear

__all__ = ["LoRALinear", "load_adapter", "replace_linear", "save_adapter"]
