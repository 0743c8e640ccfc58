"""Training methods: each runs one optimizer step, forwards and backwards included."""

from flatkern.methods.arwp import ARWP
from flatkern.methods.asam import ASAM
from flatkern.methods.bar import BAR
from flatkern.methods.base import Method
from flatkern.methods.batches import micro_batches
from flatkern.methods.efmlora import EFMLoRA
from flatkern.methods.flat_lora import FlatLoRA
from flatkern.methods.fmlora import FMLoRA
from flatkern.methods.lora import LoRA
from flatkern.methods.lora_sam import LoRASAM
from flatkern.methods.lpf_sgd import LPFSGD
from flatkern.methods.mezo import MeZO
from flatkern.methods.mixed_rwp import MixedRWP
from flatkern.methods.rwp import RWP
from flatkern.methods.sam import SAM

__all__ = [
    "ARWP",
    "ASAM",
    "BAR",
    "LPFSGD",
    "RWP",
    "SAM",
    "EFMLoRA",
    "FMLoRA",
    "FlatLoRA",
    "LoRA",
    "LoRASAM",
    "MeZO",
    "Method",
    "MixedRWP",
    "micro_batches",
]
