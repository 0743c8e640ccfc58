"""The loss along a direction and over a plane through the weights."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._files import write_files
from flatkern.landscape._evaluate import Evaluation, LossFn
from flatkern.landscape._progress import progress_of
from flatkern.landscape._ranks import Ranks
from flatkern.landscape._weights import find_weights
from flatkern.landscape.directions import Plane, check_draws
from flatkern.noise.keys import check_words
from flatkern.ops import _check

# Seconds between two writes of a partial result.
_EVERY = 10.0
_NOT_YET = None


@dataclass(frozen=True)
class Surface:
    """The loss at the points of a grid; saved as plain numbers, in JSON.

    Attributes:
        loss: float64 [points] along one direction, else [points, points]: `loss[i, j]` at
            W + x_i V1 + x_j V2, x `coordinates`. NaN where the loss is.
        coordinates: float64 [points], from -radius to radius.
        plain: the loss at the weights themselves.
        radius, seed, draws, normalize, scope: as given.
        done: bool, of `loss`'s shape: False where an interrupted run did not come to.
        in_place: the weights that were written, because code reads them outside their modules.
    """

    loss: Tensor
    coordinates: Tensor
    plain: float
    radius: float
    seed: int
    draws: tuple[int, ...]
    normalize: str
    scope: str | None
    done: Tensor
    in_place: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a JSON file, at once or not at all.

        Raises:
            OSError: the path cannot be written.
        """
        path = Path(path)
        fields = asdict(self) | {
            "loss": _encoded(self.loss, self.done),
            "coordinates": self.coordinates.tolist(),
            "plain": _encoded_number(self.plain),
        }
        del fields["done"]
        text = json.dumps({"format": "flatkern surface 1", **fields})
        write_files(path.parent, {path.name: lambda part: part.write_text(text)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Surface":
        """What `save` wrote.

        Raises:
            OSError: the path cannot be read.
            ValueError: it is no surface.
        """
        try:
            fields = json.loads(Path(path).read_text())
            if fields.pop("format") != "flatkern surface 1":
                raise KeyError("format")
            loss, done = _decoded(fields.pop("loss"))
            fields["coordinates"] = torch.tensor(fields["coordinates"], dtype=torch.float64)
            fields["plain"] = float(fields["plain"])
            for name in ("draws", "in_place"):
                fields[name] = tuple(fields[name])
            return cls(loss=loss, done=done, **fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"Surface.load: {path} must be what Surface.save wrote") from error


def _encoded_number(value: float) -> float | str:
    """JSON has no NaN and no infinities."""
    return value if math.isfinite(value) else str(value)


def _encoded(loss: Tensor, done: Tensor) -> list:
    if loss.dim() > 1:
        return [_encoded(*rows) for rows in zip(loss, done, strict=True)]
    pairs = zip(loss.tolist(), done.tolist(), strict=True)
    return [_encoded_number(value) if is_done else _NOT_YET for value, is_done in pairs]


def _decoded(values: list) -> tuple[Tensor, Tensor]:
    if isinstance(values[0], list):
        losses, masks = zip(*map(_decoded, values), strict=True)
        return torch.stack(losses), torch.stack(masks)
    loss = [math.nan if value is _NOT_YET else float(value) for value in values]
    done = [value is not _NOT_YET for value in values]
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(done)


def surface_1d(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    points: int = 51,
    radius: float = 1.0,
    seed: int = 0,
    draw: int = 0,
    normalize: str = "filter",
    scope: str | None = None,
    plane: Plane | None = None,
    save: str | os.PathLike | None = None,
    progress: bool = False,
) -> Surface:
    """L(W + x V1) for x from -radius to radius.

    Args:
        draw: the number of the direction, in [0, 2^32).
        The others are those of `surface_2d`.

    Raises:
        As `surface_2d`.
    """
    draws = (draw, 0 if draw else 1)
    options = {"seed": seed, "draws": draws, "normalize": normalize, "scope": scope}
    grid = _Grid("surface_1d", points, radius, 1, save, progress)
    return grid.run(model, loss_fn, plane, options)


def surface_2d(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    points: int = 51,
    radius: float = 1.0,
    seed: int = 0,
    draws: Sequence[int] = (0, 1),
    normalize: str = "filter",
    scope: str | None = None,
    plane: Plane | None = None,
    save: str | os.PathLike | None = None,
    progress: bool = False,
) -> Surface:
    """L(W + x V1 + y V2) over a square grid, along seeded, normalised, orthogonal directions.

    x = 1 moves every row by its own length; x = sigma by as much as Flat-LoRA's noise of that
    sigma. Of an odd number of points the centre is the plain loss, to the bit. Directions are made
    in kernels, one layer at a time, and never stored, so the peak of memory is that of a plain
    evaluation and one layer (`Surface.in_place` names the weights of which there is a copy besides,
    because code reads them without calling their modules; so it is where modules are compiled).
    Source: Li et al., "Visualizing the loss landscape of neural nets", 2018, arXiv:1712.09913.

    Args:
        model: any module; evaluated in eval mode, its weights keep their bits, whatever ends the
            run. PEFT's models are attached first (`flatkern.integrations.peft.attach`). Under FSDP2
            and tensor parallelism all ranks call this alike.
        loss_fn: takes nothing and returns the loss, a scalar: of the same data each time, in as
            many batches as it likes. It calls `model`. Where ranks hold different data it averages
            over them: what it returns is taken as it is. NaN is kept, and no error.
        points: of a side, at least 2.
        radius: finite and above 0, in lengths of the weights.
        seed: in [0, 2^32).
        draws: the numbers of the two directions; of `worst_flatness`, for the plane through the
            worst sampled draw: `draws=(worst.draw, other)`.
        normalize, scope: see `Plane`.
        plane: directions from elsewhere in place of `seed`, `draws`, `normalize` and `scope`: of
            another adapter of this model, with the lengths of that one.
        save: a JSON file for the partial result, written every ten seconds and at any end, Ctrl-C
            included; where it exists, the run goes on from there. Where ranks share weights the
            first writes it, and all must be able to read it.
        progress: show a bar (needs tqdm).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, nothing in scope, or a file
            of another surface, model or data.
        RuntimeError: a noise window is open, or a layer is merged.
        OSError: the file cannot be written; found before the first point.
    """
    options = {"seed": seed, "draws": draws, "normalize": normalize, "scope": scope}
    grid = _Grid("surface_2d", points, radius, 2, save, progress)
    return grid.run(model, loss_fn, plane, options)


class _Grid:
    """A run over the points of a grid, which may be interrupted and taken up again."""

    def __init__(
        self,
        op: str,
        points: int,
        radius: float,
        dimensions: int,
        save: str | os.PathLike | None,
        progress: bool,
    ) -> None:
        _check.kinds(op, int, points=points)
        if points < 2:
            _check.refuse(op, "points", "at least 2", points)
        _check.kinds(op, (float, int), radius=radius)
        if not 0 < radius < math.inf:
            _check.refuse(op, "radius", "finite and above 0", radius)
        _check.kinds(op, (str, os.PathLike), optional=True, save=save)
        self._op, self._radius, self._save = op, float(radius), save
        self._progress = progress
        # Of an odd number the middle is 0, and both sides are alike.
        steps = [2 * i - (points - 1) for i in range(points)]
        self._coordinates = [self._radius * step / (points - 1) for step in steps]
        self._shape = (points,) * dimensions

    def run(
        self, model: nn.Module, loss_fn: LossFn, plane: Plane | None, options: dict[str, Any]
    ) -> Surface:
        """Evaluate what is not there yet."""
        _check.kinds(self._op, nn.Module, model=model)
        _check.kinds(self._op, Plane, optional=True, plane=plane)
        if plane is None:
            check_words(self._op, seed=options["seed"])
            options["draws"] = check_draws(self._op, options["draws"])
            plane = Plane(model, **options)
        weights = find_weights(self._op, model, plane.scope)
        plane.check(self._op, weights)
        weights = [weight for weight in weights if weight.name in plane.names]
        self._ranks = Ranks(weights)
        with Evaluation(self._op, model, loss_fn, weights) as at:
            surface = self._begin(at, plane)
            todo = (~surface.done).nonzero().tolist()
            done = surface.done.numel() - len(todo)
            with (
                self._saved(surface) as save,
                progress_of(self._op, surface.done.numel(), self._progress, done) as advance,
            ):
                for index in todo:
                    a, b = ([self._coordinates[i] for i in index] + [0.0])[:2]
                    moved = a != 0 or b != 0
                    loss = at.loss(plane.shifts(weights, a, b)) if moved else at.plain
                    surface.loss[tuple(index)] = loss
                    surface.done[tuple(index)] = True
                    advance()
                    save()
        return surface

    def _begin(self, at: Evaluation, plane: Plane) -> Surface:
        """A surface without points, or what an earlier run left."""
        fresh = Surface(
            loss=torch.full(self._shape, math.nan, dtype=torch.float64),
            coordinates=torch.tensor(self._coordinates, dtype=torch.float64),
            plain=at.plain,
            radius=self._radius,
            seed=plane.seed,
            draws=plane.draws[: len(self._shape)],
            normalize=plane.normalize,
            scope=plane.scope,
            done=torch.zeros(self._shape, dtype=torch.bool),
            in_place=tuple(at.in_place),
        )
        with self._ranks.agreed(self._op):
            return fresh if self._save is None else self._left_over(fresh)

    def _left_over(self, fresh: Surface) -> Surface:
        if not Path(self._save).exists():
            return fresh
        found = Surface.load(self._save)
        for name in ("seed", "draws", "normalize", "scope", "radius", "plain"):
            then, now = getattr(found, name), getattr(fresh, name)
            if then != now and not (then != then and now != now):
                what = "the loss at the weights" if name == "plain" else name
                raise ValueError(
                    f"{self._op}: save must be a new file or one of this surface, got {self._save} "
                    f"where {what} is {then!r}, not {now!r}"
                )
        if found.loss.shape != fresh.loss.shape:
            _check.refuse(self._op, "save", f"of {list(fresh.loss.shape)} points", found.loss)
        return found

    @contextlib.contextmanager
    def _saved(self, surface: Surface) -> Iterator[Any]:
        """Yields what writes the surface now and then; it is written at any end."""
        with self._ranks.agreed(self._op):
            # A path that cannot be written shows before the work.
            if self._save is not None and self._ranks.first:
                surface.save(self._save)
        if self._save is None or not self._ranks.first:
            yield lambda: None
            return
        last = time.monotonic()

        def save() -> None:
            nonlocal last
            if time.monotonic() - last > _EVERY:
                surface.save(self._save)
                last = time.monotonic()

        try:
            yield save
        finally:
            surface.save(self._save)
