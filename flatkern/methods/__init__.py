"""Training methods: each runs one optimizer step, forwards and backwards included."""

from flatkern.methods.asam import ASAM
from flatkern.methods.bar import BAR
from flatkern.methods.base import Method
from flatkern.methods.efmlora import EFMLoRA
from flatkern.methods.flat_lora import FlatLoRA
from flatkern.methods.fmlora import FMLoRA
from flatkern.methods.lora import LoRA
from flatkern.methods.lora_sam import LoRASAM
from flatkern.methods.mezo import MeZO
from flatkern.methods.sam import SAM

__all__ = [
    "ASAM",
    "BAR",
    "SAM",
    "EFMLoRA",
    "FMLoRA",
    "FlatLoRA",
    "LoRA",
    "LoRASAM",
    "MeZO",
    "Method",
]
