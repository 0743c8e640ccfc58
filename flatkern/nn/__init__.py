"""LoRA layers that can be seen through noise, and how they get into a model and out again."""

from flatkern.nn.adapter import load_adapter, save_adapter
from flatkern.nn.awsvd import awsvd_init
from flatkern.nn.bda import BDALinear
from flatkern.nn.dora import DoRALinear
from flatkern.nn.factors import adalora_factors
from flatkern.nn.linear import LoRALinear
from flatkern.nn.lora_ga import lora_ga_init
from flatkern.nn.lora_plus import lora_plus_groups
from flatkern.nn.nora import NoRALinear
from flatkern.nn.parameters import LoRAParameter
from flatkern.nn.replace import replace_linear

__all__ = [
    "BDALinear",
    "DoRALinear",
    "LoRALinear",
    "LoRAParameter",
    "NoRALinear",
    "adalora_factors",
    "awsvd_init",
    "load_adapter",
    "lora_ga_init",
    "lora_plus_groups",
    "replace_linear",
    "save_adapter",
]
