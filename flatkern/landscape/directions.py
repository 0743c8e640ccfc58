"""Planes through a model's weights, whose directions are seeds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatkern.landscape._weights import Shift, Weight, find_weights
from flatkern.ops import _check

NORMALIZATIONS = ("filter", "global")


class Plane:
    """W + a V1 + b V2 with two orthogonal directions of the length of the weights.

    Before they are normalised both are standard normals that a seed addresses, so a plane holds
    three numbers a row and no direction. A plane is of names and numbers of weights: it serves any
    model with the same ones, which is then seen along the very same directions.

    Sources: filter normalisation, Li et al., "Visualizing the loss landscape of neural nets" (2018,
    arXiv:1712.09913), section 4.

    Attributes:
        seed, draws, normalize, scope: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        draws: Sequence[int] = (0, 1),
        normalize: str = "filter",
        scope: str | None = None,
    ) -> None:
        """Find the lengths; nothing is changed, and no generator is used.

        Args:
            model: any module, clean.
            seed: in [0, 2^32).
            draws: the numbers of the two normals, as `worst_flatness` names its worst draw.
            normalize: "filter": every row of V1 and V2 is as long as the row of W' (of W where
                there is no adapter), and orthogonal to it in the other by Gram-Schmidt row by row;
                weights of one dimension keep still, and so does a row of one element along V2.
                Where there are no others in scope, a weight of one dimension is one row.
                "global": V ||W|| / ||V|| over all weights in scope, orthogonal as a whole.
            scope: as in `flatkern.WeightNoise`; None: "merged" where the model has layers for it,
                else "full".

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value, or nothing in scope.
            RuntimeError: a noise window is open.
        """
        op = "Plane"
        _check.one_of(op, NORMALIZATIONS, normalize=normalize)
        draws = check_draws(op, draws)
        weights = find_weights(op, model, scope)
        self.seed, self.draws, self.normalize, self.scope = seed, draws, normalize, scope
        matrices = [weight for weight in weights if len(weight.shape) > 1]
        chosen = weights if normalize == "global" or not matrices else matrices
        norms = [weight.norms() for weight in chosen]
        products = [w.products([w.key(seed, draw) for draw in draws]) for w in chosen]
        if normalize == "global":
            # One row for all: the sums over all weights.
            device = products[0].device
            total = sum(found.sum(1, keepdim=True).to(device) for found in products)
            length = sum(norm.square().sum().to(device) for norm in norms).sqrt()
            rows = _coefficients(length.view(1), total)
            found = [
                weight.without_padding(rows.to(n.device).repeat(1, len(n)))
                for weight, n in zip(chosen, norms, strict=True)
            ]
        elif not matrices:
            found = [
                _coefficients(n.norm().view(1), p.sum(1, keepdim=True)).expand(3, len(n))
                for n, p in zip(norms, products, strict=True)
            ]
        else:
            found = [_coefficients(n, p) for n, p in zip(norms, products, strict=True)]
        self._rows = {w.name: rows for w, rows in zip(chosen, found, strict=True)}

    @property
    def names(self) -> list[str]:
        """The weights that move."""
        return list(self._rows)

    def shifts(self, weights: list[Weight], a: float, b: float) -> list[Shift | None]:
        """What W + a V1 + b V2 adds to each weight; nothing to those that are not of the plane."""
        return [self._shift(weight, a, b) for weight in weights]

    def _shift(self, weight: Weight, a: float, b: float) -> Shift | None:
        rows = self._rows.get(weight.name)
        if rows is None:
            return None
        first, second, shared = rows.to(weight.device)
        keys = [weight.key(self.seed, draw) for draw in self.draws]
        along = a * first - b * shared
        if b == 0:
            return Shift(along.float()[None], keys[0][None])
        return Shift(torch.stack([along, b * second]).float(), torch.stack(keys))

    def direction(self, model: nn.Module, name: str, axis: int) -> Tensor:
        """V1 (axis 0) or V2 (axis 1) of one weight, float32; to look at, no surface needs it.

        Raises:
            KeyError: `name` is none of `names`.
        """
        weight = next(w for w in find_weights("Plane", model, self.scope) if w.name == name)
        shift = self._shift(weight, *((1.0, 0.0) if axis == 0 else (0.0, 1.0)))
        zeros = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        return weight.shifted(zeros, shift)

    def check(self, op: str, weights: list[Weight]) -> None:
        """ValueError unless the weights are those of this plane."""
        shapes = {weight.name: weight.count for weight in weights}
        for name, rows in self._rows.items():
            if shapes.get(name) != rows.shape[1]:
                raise ValueError(
                    f"{op}: plane must be of the model's own weights, got one with "
                    f"{rows.shape[1]} rows of {name}"
                )


def _coefficients(length: Tensor, products: Tensor) -> Tensor:
    """R / ||z||, R / ||u|| and its share of z, u = y - (<z, y> / <z, z>) z; float64 [3, rows].

    What has no direction of its own is 0.
    """
    zz, zy, yy = products
    first = _finite(length / zz.sqrt())
    share = _finite(zy / zz)
    rest = yy - share * zy
    # What rounding leaves of a row of one element.
    rest = torch.where(rest > 1e-12 * yy, rest, 0.0)
    second = _finite(length / rest.sqrt())
    return torch.stack([first, second, second * share])


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def check_draws(op: str, draws: Sequence[int]) -> tuple[int, int]:
    """Two different numbers in [0, 2^32)."""
    draws = tuple(draws)
    fine = len(draws) == 2 and all(type(d) is int and 0 <= d < 2**32 for d in draws)
    if not fine or draws[0] == draws[1]:
        _check.refuse(op, "draws", "two different ints in [0, 2**32)", draws)
    return draws
