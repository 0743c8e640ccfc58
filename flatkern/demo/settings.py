"""What is compared: label settings, arms, and the values chosen on the validation split."""

from dataclasses import dataclass

TRAINING_SENTENCES = 256
VALIDATION_SENTENCES = 2000
TEST_SENTENCES = 1000  # of each domain
QUICK_SEEDS, FULL_SEEDS = 2, 5
# The published default for LoRA and Flat-LoRA of rank 8, alpha 16 (Li et al., 2024), for every arm.
LR = 5e-4


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one arm from another; sigma 0 is training without noise."""

    arm: str
    lr: float
    sigma: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Setting:
    """One experiment: how many labels are wrong, how long to train, and the chosen values.

    flipped is a share of the training labels. sigma (Flat-LoRA) and dropout (LoRA + dropout) were
    chosen by `flatkern demo --choose`, on the validation split alone.
    """

    name: str
    flipped: float
    epochs: int
    quick_epochs: int
    sigma: float
    dropout: float
    lr: float = LR

    def recipes(self) -> tuple[Recipe, ...]:
        """The three arms."""
        return (
            Recipe("LoRA", self.lr),
            Recipe("Flat-LoRA", self.lr, sigma=self.sigma),
            Recipe("LoRA + dropout", self.lr, dropout=self.dropout),
        )


SETTINGS = (
    Setting("30 % flipped", 0.3, epochs=14, quick_epochs=7, sigma=0.6, dropout=0.9),
    Setting("clean labels", 0.0, epochs=6, quick_epochs=3, sigma=0.1, dropout=0.1),
)
