"""What `WeightNoise` accepts, for those who take its options before there is a model as well."""

from flatkern.noise.fisher import Fisher
from flatkern.noise.keep import RESTORES
from flatkern.noise.keys import RANKS, check_words
from flatkern.noise.modes import MODES
from flatkern.noise.scopes import SCOPES
from flatkern.noise.strategies import STRATEGIES
from flatkern.ops import _check


def check_options(
    op: str,
    *,
    sigma: float,
    strategy: str,
    scope: str,
    mode: str,
    restore: str | None,
    seed: int,
    ranks: str,
    fisher: Fisher | None,
) -> None:
    """TypeError or ValueError, in the name of `op`, unless `WeightNoise` accepts these."""
    _check.kinds(op, (float, int), sigma=sigma)
    _check.finite(op, "sigma", sigma, minimum=0.0)
    _check.one_of(op, tuple(STRATEGIES), strategy=strategy)
    _check.one_of(op, SCOPES, scope=scope)
    _check.one_of(op, MODES, mode=mode)
    if restore is not None:
        _check.one_of(op, RESTORES, restore=restore)
    _check.one_of(op, RANKS, ranks=ranks)
    check_words(op, seed=seed)
    _check.kinds(op, Fisher, optional=True, fisher=fisher)
    if (strategy == "fisher") != (fisher is not None):
        _check.refuse(op, "fisher", "given with strategy 'fisher' and with no other", fisher)
