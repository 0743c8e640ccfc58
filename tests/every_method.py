"""Every method with options under which it does something, for tests of what they run inside."""

from functools import partial

from flatkern import inverse_sqrt, methods

EVERY = {
    "LoRA": partial(methods.LoRA),
    "FlatLoRA": partial(methods.FlatLoRA, sigma=0.3),
    "RWP": partial(methods.RWP, sigma=0.1),
    "MixedRWP": partial(methods.MixedRWP, sigma=0.1),
    "ARWP": partial(methods.ARWP, sigma=0.1),
    "LPFSGD": partial(methods.LPFSGD, sigma=0.1),
    "GMP": partial(methods.GMP, sigma=0.1, draws=2),
    "SmoothOut": partial(methods.SmoothOut, sigma=0.1),
    "NoisyTune": partial(methods.NoisyTune, lam=0.5),
    "EntropySGD": partial(methods.EntropySGD, inner_steps=2),
    "SAM": partial(methods.SAM, rho=0.5),
    "SAM last": partial(methods.SAM, rho=0.5, last_only=True),
    "SAM ascents": partial(methods.SAM, rho=0.5, ascents=2),
    "SAM merged": partial(methods.SAM, rho=0.5, scope="merged"),
    "ASAM": partial(methods.ASAM, rho=0.5),
    "GSAM": partial(methods.GSAM, rho=0.5),
    "FriendlySAM": partial(methods.FriendlySAM, rho=0.5, schedule=inverse_sqrt()),
    "GAM": partial(methods.GAM, rho=0.5, alpha=0.5),
    "LoRASAM": partial(methods.LoRASAM, rho=0.5),
    "BAR": partial(methods.BAR, alpha=2.0),
    "FMLoRA": partial(methods.FMLoRA, rho=0.5),
    "EFMLoRA": partial(methods.EFMLoRA, rho=0.5),
    "LoRAPro": partial(methods.LoRAPro),
    "MeZO": partial(methods.MeZO, mu=1e-2),
    "ES": partial(methods.ES, sigma=1e-2, population=2),
}
# The SAM family, and what came with it: those that make more than a pass, or noise of their own.
NEWER = [
    "SAM ascents",
    "GSAM",
    "FriendlySAM",
    "GAM",
    "GMP",
    "SmoothOut",
    "NoisyTune",
    "EntropySGD",
    "LoRAPro",
    "ES",
]
