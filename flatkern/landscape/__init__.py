"""How flat the loss is around a model's weights: figures, surfaces and their pictures."""

from flatkern.landscape._estimate import Estimate
from flatkern.landscape.directions import Plane
from flatkern.landscape.flatness import (
    RadiusCurve,
    WorstFlatness,
    average_flatness,
    radius_curve,
    worst_flatness,
)
from flatkern.landscape.hessian import Eigenvalue, hessian_top_eigenvalue, hessian_trace
from flatkern.landscape.plots import plot_radius, plot_surface
from flatkern.landscape.surfaces import Surface, surface_1d, surface_2d

__all__ = [
    "Eigenvalue",
    "Estimate",
    "Plane",
    "RadiusCurve",
    "Surface",
    "WorstFlatness",
    "average_flatness",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "plot_radius",
    "plot_surface",
    "radius_curve",
    "surface_1d",
    "surface_2d",
    "worst_flatness",
]
