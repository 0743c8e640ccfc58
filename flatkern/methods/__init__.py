"""Training methods: each runs one optimizer step, forwards and backwards included."""

from flatkern.methods.arwp import ARWP
from flatkern.methods.asam import ASAM
from flatkern.methods.bar import BAR
from flatkern.methods.base import Method
from flatkern.methods.batches import micro_batches
from flatkern.methods.efmlora import EFMLoRA
from flatkern.methods.entropy_sgd import EntropySGD
from flatkern.methods.es import ES
from flatkern.methods.flat_lora import FlatLoRA
from flatkern.methods.fmlora import FMLoRA
from flatkern.methods.friendly_sam import FriendlySAM
from flatkern.methods.gam import GAM
from flatkern.methods.gmp import GMP
from flatkern.methods.gsam import GSAM
from flatkern.methods.lora import LoRA
from flatkern.methods.lora_pro import LoRAPro
from flatkern.methods.lora_sam import LoRASAM
from flatkern.methods.lpf_sgd import LPFSGD
from flatkern.methods.mezo import MeZO
from flatkern.methods.mixed_rwp import MixedRWP
from flatkern.methods.noisy_tune import NoisyTune
from flatkern.methods.rwp import RWP
from flatkern.methods.sam import SAM
from flatkern.methods.smooth_out import SmoothOut

__all__ = [
    "ARWP",
    "ASAM",
    "BAR",
    "ES",
    "GAM",
    "GMP",
    "GSAM",
    "LPFSGD",
    "RWP",
    "SAM",
    "EFMLoRA",
    "EntropySGD",
    "FMLoRA",
    "FlatLoRA",
    "FriendlySAM",
    "LoRA",
    "LoRAPro",
    "LoRASAM",
    "MeZO",
    "Method",
    "MixedRWP",
    "NoisyTune",
    "SmoothOut",
    "micro_batches",
]
