"""NoRA: a small adapter nested between two frozen factors of the weight."""

import math

import torch
from torch import nn

from flatkern.nn.factors import nora_factors, singular_factors
from flatkern.nn.linear import LoRALinear
from flatkern.ops import _check


class NoRALinear(LoRALinear):
    """y = x W^T + b + s B B' A' A dropout(x); only the inner A' and B' are trained: 2 r r' numbers.

    The outer A and B start as an nn.Linear's and are frozen; `awsvd_init` computes them from the
    weight and calibration data. init_lora_weights is about the inner ones: True (A' as nn.Linear,
    B' = 0), "gaussian" (both with standard deviation 1 / r', so the layer does not start at W),
    False (both as nn.Linear) or "svd": as True, over the r largest singular values of W as the
    outer B A, which is `awsvd_init` without data. Source: "NoRA: Nested Low-Rank Adaptation", 2024.

    Attributes:
        lora_A, lora_B: [r, in_features] and [out_features, r], frozen.
        nora_A, nora_B: [r', r] and [r, r'], trained, of lora_A's dtype.
        r_inner: r', by default half of r (rounded up).
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    """

    products = staticmethod(nora_factors)

    @classmethod
    def check_kind(cls, r: int, r_inner: int | None = None) -> None:
        """TypeError or ValueError unless `r_inner` is an int in [1, r] or None."""
        _check.kinds(cls.__name__, int, optional=True, r_inner=r_inner)
        if r_inner is not None and not 1 <= r_inner <= r:
            _check.refuse(cls.__name__, "r_inner", f"in [1, r = {r}]", r_inner)

    def _build_kind(self, r_inner: int | None = None) -> None:
        self.r_inner = (self.r + 1) // 2 if r_inner is None else r_inner
        like = {"device": self.lora_A.device, "dtype": self.lora_A.dtype}
        self.nora_A = nn.Parameter(torch.empty((self.r_inner, self.r), **like))
        self.nora_B = nn.Parameter(torch.empty((self.r, self.r_inner), **like))
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    def _init_adapters(self, init_lora_weights: bool | str) -> None:
        if init_lora_weights == "pissa":
            raise ValueError(
                "NoRALinear: init_lora_weights must be True, False, 'gaussian' or 'svd', "
                "got 'pissa'"
            )
        if init_lora_weights == "svd":
            self._init_outer()
        else:
            for outer in (self.lora_A, self.lora_B):
                nn.init.kaiming_uniform_(outer, a=math.sqrt(5))
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.nora_A, std=1 / self.r_inner)
            nn.init.normal_(self.nora_B, std=1 / self.r_inner)
            return
        nn.init.kaiming_uniform_(self.nora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.nora_B)
        else:
            nn.init.kaiming_uniform_(self.nora_B, a=math.sqrt(5))

    @torch.no_grad()
    def _init_outer(self) -> None:
        if self.r > min(self.weight.shape):
            accepted = f"at most {min(self.weight.shape)} with init_lora_weights='svd'"
            _check.refuse(type(self).__name__, "r", accepted, self.r)
        lora_A, lora_B = singular_factors(self.weight.to(self.lora_A.dtype), self.r)
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)

    def extra_repr(self) -> str:
        """Sizes and options, for print(model)."""
        return super().extra_repr() + f", r_inner={self.r_inner}"
