"""SAM: the gradient at the worst point of a small ball around the weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._ascent import Ascent
from flatkern.methods._layers import WeightGradient, adding, lora_layers, recording
from flatkern.methods.base import LossFn
from flatkern.ops import _check

SCOPES = ("trainable", "merged")


class SAM(Ascent):
    """The gradient at w + e with e = rho g / ||g||, where g is the gradient at w.

    Source: Foret et al., "Sharpness-aware minimization", 2021. With scope "merged", g is the
    gradient of the merged weights W' = W + s B A of all LoRA layers, and A and B take their
    gradients at W' + e: the comparison in Li et al., "Flat-LoRA", 2024, table 6.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        scope: str = "trainable",
        norm: str = "joint",
        last_only: bool = False,
        **options: Any,
    ) -> None:
        """Choose what is perturbed, and how far.

        Args:
            model, optimizer: see `Method`.
            rho: radius, finite and at least 0.
            scope: "trainable" parameters, of which a copy is kept; or "merged" weights of
                LoRALinear and of PEFT's linear layers. These are not written: in the second pass
                x e^T is added to the layers' outputs. Kept for it, from tokens x (m + n) numbers a
                layer up to m x n; with several ranks m x n.
            norm: "joint", one ball for all tensors, or "per_tensor", one for each.
            last_only: take the second gradient from the last micro-batch alone, of each rank.
            options: `schedule` of rho, `ascents` and `seed`, see `Ascent` in _ascent.py; those of
                `Method`.

        Raises:
            TypeError, ValueError: see `Method`; an option of the wrong kind or value, or "merged"
                without such layers.
        """
        super().__init__(model, optimizer, rho=rho, norm=norm, last_only=last_only, **options)
        _check.one_of(type(self).__name__, SCOPES, scope=scope)
        self.scope = scope
        layers = lora_layers(self, "linear") if scope == "merged" else []
        self._modules = [layer.module for layer in layers]

    @contextlib.contextmanager
    def ascended(self, loss_fn: LossFn, batches: Sequence[Any]) -> Iterator[None]:
        """The model at w + e or at W' + e."""
        if self.scope == "trainable":
            with super().ascended(loss_fn, batches):
                yield
            return
        with contextlib.ExitStack() as moved:
            gradients = self._recorded(lambda: self.mean_gradient(loss_fn, batches))
            moved.enter_context(adding(self._steps(gradients)))
            passes = self.further_ascents(loss_fn, batches)
            for _ in range(1, self.ascents):
                moved.enter_context(adding(self._steps(self._recorded(lambda: next(passes)))))
            yield

    def _recorded(self, run: Callable[[], Any]) -> dict[nn.Module, WeightGradient]:
        """G of every layer in a pass, the mean over the ranks."""
        gradients = {module: WeightGradient(module) for module in self._modules}
        with recording(gradients):
            run()
        for gradient in gradients.values():
            gradient.average(self.ranks)
        return gradients

    def _steps(
        self, gradients: dict[nn.Module, WeightGradient]
    ) -> dict[nn.Module, tuple[WeightGradient, Tensor]]:
        factors = self.factors([gradient.norm() for gradient in gradients.values()])
        return {m: (gradients[m], f) for m, f in zip(gradients, factors, strict=True)}
