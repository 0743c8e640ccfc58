"""What is compared: arms, their values of which validation chooses one, and the cells."""

from collections.abc import Iterator
from dataclasses import dataclass, field

TASKS = ("text", "vision")
# Shares of the training labels that are wrong.
LABELS = {"clean": 0.0, "30 % flipped": 0.3}
# The published default for LoRA and Flat-LoRA of rank 8, alpha 16 (Li et al., 2024).
LR, RANK = 5e-4, 8
SEEDS, QUICK_SEEDS = 5, 2
PLAIN, STOPPED, FLAT = "LoRA", "LoRA, early stopping", "Flat-LoRA (W)"
# Those of the question that the study is about; with plain LoRA comes early stopping.
MAIN = (PLAIN, "LoRA + dropout", FLAT, "SAM (W)")
# Adapters of other kinds or starts: their arms have these names, and Flat-NAME.
KINDS = {
    "PiSSA": ("pissa", LR),
    "LoRA-GA": ("lora_ga", LR),
    "DoRA": ("dora", LR),
    "AdaLoRA": ("adalora", 4 * LR),
    "LoRA+": ("lora_plus", LR),
}


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: arms of one name are alternatives; validation chooses among them.
        value: what distinguishes this one; "" where there is one only.
        start: "full" (no adapter), "lora", or a kind of KINDS.
        method: a name in `flatkern.methods`; `options` are its own.
    """

    name: str
    value: str = ""
    start: str = "lora"
    rank: int = RANK
    lr: float = LR
    dropout: float = 0.0
    method: str = "LoRA"
    options: dict[str, object] = field(default_factory=dict)


def all_arms() -> list[Arm]:
    """Every arm: the main comparison, other adapters with and without noise, other ranks."""
    arms = [Arm("full fine-tuning", f"lr={lr:g}", "full", lr=lr) for lr in (2e-5, 1e-4)]
    arms.append(Arm(PLAIN))
    for dropout in (0.1, 0.5, 0.9):
        arms.append(Arm("LoRA + dropout", f"p={dropout:g}", dropout=dropout))

    def values(name: str, method: str, option: str, values: tuple, **options: object) -> None:
        for value in values:
            own = {option: value} | options
            arms.append(Arm(name, f"{option}={value:g}", method=method, options=own))

    values(FLAT, "FlatLoRA", "sigma", (0.05, 0.1, 0.15, 0.3, 0.6))
    values("Flat-LoRA (A,B)", "FlatLoRA", "sigma", (0.15, 0.3, 0.6), scope="lora")
    values("Flat-LoRA (all)", "FlatLoRA", "sigma", (0.15, 0.3), scope="all")
    for scope in ("lora", "origin", "full"):
        values(f"RWP ({scope})", "RWP", "sigma", (0.003, 0.01), scope=scope)
    values("SAM (A,B)", "SAM", "rho", (0.05, 0.2))
    values("SAM (W)", "SAM", "rho", (0.05, 0.2), scope="merged")
    for name, (start, lr) in KINDS.items():
        arms.append(Arm(name, "", start, lr=lr))
        for sigma in (0.15, 0.3):
            options = {"sigma": sigma}
            arms.append(
                Arm(f"Flat-{name}", f"sigma={sigma:g}", start, RANK, lr, 0.0, "FlatLoRA", options)
            )
    for rank in (2, 32):
        arms.append(Arm(f"{PLAIN}, rank {rank}", rank=rank))
        options = {"sigma": 0.3}
        arms.append(
            Arm(f"{FLAT}, rank {rank}", "sigma=0.3", rank=rank, method="FlatLoRA", options=options)
        )
    return arms


def quick_arms() -> list[Arm]:
    """One value of a few arms."""
    wanted = {(PLAIN, ""), ("LoRA + dropout", "p=0.5"), (FLAT, "sigma=0.3"), ("SAM (W)", "rho=0.2")}
    return [arm for arm in all_arms() if (arm.name, arm.value) in wanted]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    labels: str
    seed: int
    arm: Arm

    @property
    def key(self) -> str:
        """Of this cell and no other."""
        return "|".join((self.task, self.labels, str(self.seed), self.arm.name, self.arm.value))


def cells(arms: list[Arm], tasks: list[str], labels: list[str], seeds: int) -> Iterator[Cell]:
    """The main arms on every seed, then the others seed by seed: a study may stop early."""
    for main in (True, False):
        for seed in range(seeds):
            for task in tasks:
                for given in labels:
                    for arm in arms:
                        if (arm.name in MAIN) == main:
                            yield Cell(task, given, seed, arm)
