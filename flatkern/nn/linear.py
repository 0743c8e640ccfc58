"""A linear layer with a low-rank adapter that can see its weight through noise."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flatkern.nn.factors import wide
from flatkern.nn.merging import Mergeable
from flatkern.nn.pissa import pissa_factors
from flatkern.nn.sites import noisy_product
from flatkern.ops import _check

_OP = "LoRALinear"
_INITS = (True, False, "gaussian", "pissa", "svd")


def check_options(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    init_lora_weights: bool | str,
) -> None:
    """TypeError or ValueError unless `LoRALinear` accepts these options."""
    _check.kinds(_OP, int, r=r)
    _check.kinds(_OP, (float, int), lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    _check.kinds(_OP, bool, use_rslora=use_rslora)
    if r < 1:
        _check.refuse(_OP, "r", "at least 1", r)
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        _check.refuse(_OP, "lora_alpha", "finite and above 0", lora_alpha)
    if not 0 <= lora_dropout < 1:
        _check.refuse(_OP, "lora_dropout", "in [0, 1)", lora_dropout)
    if init_lora_weights not in _INITS:
        accepted = "True, False, 'gaussian', 'pissa' or, of a NoRALinear, 'svd'"
        _check.refuse(_OP, "init_lora_weights", accepted, init_lora_weights)


def check_linear(linear: nn.Module, name: str = "linear") -> None:
    """TypeError or ValueError unless a `LoRALinear` can take the place of `linear`."""
    what = f"{_OP}: {name} must be nn.Linear, got {type(linear).__name__}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{what}: nn.MultiheadAttention reads its weight and never calls it; name it in "
            "target_parameters of replace_linear"
        )
    if isinstance(linear, LoRALinear):
        raise TypeError(f"{what}: it has adapters already")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{what}; its weight may be named in target_parameters of replace_linear")
    if getattr(linear.forward, "__func__", None) is not nn.Linear.forward:
        raise TypeError(f"{what} with a forward of its own, which would be lost")
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        raise TypeError(f"{what} whose weight is not a parameter (parametrized or pruned)")
    weight = linear.weight
    if is_traceable_wrapper_subclass(weight) and not hasattr(weight, "device_mesh"):
        raise TypeError(
            f"{what} whose weight is a {type(weight).__name__}; quantised layers take noise "
            "through flatkern.integrations.peft.attach"
        )
    if weight.dtype not in _check.FLOAT_DTYPES:
        accepted = "float32, bfloat16, float16 or float64"
        _check.refuse(_OP, f"{name}.weight", accepted, weight)
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        raise ValueError(f"{_OP}: {name} must have no hooks, which would be lost; remove them")


class LoRALinear(Mergeable):
    """y = x W^T + b + s B A dropout(x), where W and b are frozen and A and B are trained.

    Outside a window of `flatkern.WeightNoise` this is PEFT's LoRA layer, bit for bit on the same
    values. Inside a virtual window the base product uses W + noise, regenerated in backward; the
    weight itself is not written. Source: Hu et al., "LoRA", 2021, equation 3.

    Other kinds of adapter are subclasses, which say what `factors` and `merged_weight` are.

    Attributes:
        weight: [out_features, in_features], frozen. Where the adapters do not start at zero
            ("pissa", `lora_ga_init`) it is W - s B0 A0, rounded, and no longer anyone else's.
        bias: [out_features], frozen, or None.
        lora_A: [r, in_features]; float32 over a 16-bit weight, else of the weight's dtype.
        lora_B: [out_features, r], of lora_A's dtype.
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        in_features, out_features, r, lora_alpha, use_rslora: as given.
        lora_dropout: the dropout module in front of A.
        offset_A, offset_B: buffers, A0 and B0 if `weight` is W - s B0 A0, else None.
        merged: whether `weight` holds W + s B A at the moment.
        quantized, linear: None and True, see `flatkern.nn.sites.Site`.
    """

    quantized = None
    takes_shards = True
    linear = True
    # Of a kind with more adapters than A and B: makes A and B of W + s B A out of all, by name.
    products: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kind: Any,
    ) -> None:
        """A new layer; weight and bias start as in nn.Linear.

        Args:
            in_features, out_features: sizes, at least 1.
            r: rank, at least 1.
            lora_alpha: numerator of the scaling, finite and above 0.
            lora_dropout: probability in [0, 1), of the adapter's input alone.
            use_rslora: divide by sqrt(r), not r (Kalajdzievski, 2023).
            init_lora_weights: True (A as nn.Linear, B = 0), "gaussian" (A with standard deviation
                1 / r, B = 0), False (both as nn.Linear) or "pissa" (the r largest singular values
                of W in s B A, the rest in the base; Meng et al., 2024), as in PEFT.
            bias: whether there is one.
            device, dtype: of the weight; float32, bfloat16, float16 or float64.
            kind: options of a subclass; a LoRALinear has none.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or value.
        """
        super().__init__()
        _check.kinds(_OP, int, in_features=in_features, out_features=out_features)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                _check.refuse(_OP, name, "at least 1", size)
        check_options(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.check_kind(r, **kind)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        check_linear(linear)
        self._build(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, kind)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        **kind: Any,
    ) -> Self:
        """A layer around `linear`'s own weight and bias parameters, which are shared and frozen.

        With "pissa" the weight is a new parameter, and `linear`'s stays as it is.

        Args:
            linear: an nn.Linear; a subclass only if it inherits nn.Linear's forward.
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in the constructor.
            kind: options of a subclass.

        Raises:
            TypeError: `linear` is not an nn.Linear, or computes something of its own.
            ValueError: an option out of range, a weight dtype without ops, hooks on `linear`.
        """
        check_linear(linear)
        check_options(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        cls.check_kind(r, **kind)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, kind)
        return layer

    @classmethod
    def check_kind(cls, r: int) -> None:
        """TypeError or ValueError unless this kind of layer accepts its own options: here none."""

    def _build(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        kind: dict[str, Any],
    ) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        dtype = torch.float32 if self.weight.dtype.itemsize == 2 else self.weight.dtype
        like = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **like))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **like))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.register_buffer("offset_A", None)
        self.register_buffer("offset_B", None)
        self._start_unmerged()
        self._build_kind(**kind)
        self._init_adapters(init_lora_weights)
        self.train(linear.training)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _build_kind(self) -> None:
        """Add what a kind of adapter has besides; its options arrive as keywords."""

    def _init_adapters(self, init_lora_weights: bool | str) -> None:
        if init_lora_weights == "svd":
            accepted = "another than NoRALinear's, such as 'pissa'"
            _check.refuse(type(self).__name__, "init_lora_weights", accepted, "svd")
        if init_lora_weights == "pissa":
            start = pissa_factors(self.weight, self.r, self.scaling)
            self.rebase(*start, self.offset_weight(*start))
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k] of W + s B A, differentiable in what is trained."""
        if self.products is not None:
            return self.products(**self.adapters())
        return self.lora_A, self.lora_B

    def operands(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s of W + s B A, as they are: for what needs no gradient."""
        # Not through Module.__getattr__, where that is possible: a window asks every layer.
        own = self._parameters
        plain = self.products is None and "lora_A" in own and "lora_B" in own
        lora_A, lora_B = (own["lora_A"], own["lora_B"]) if plain else self.factors()
        return lora_A, lora_B, self.scaling

    def row_factor(self) -> Tensor | float:
        """d of W' = diag(d) (W + s B A): the gradient of W is d times that of W'."""
        return 1.0

    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by name: all but weight and bias."""
        own, base = self._parameters.items(), ("weight", "bias")
        return {name: value for name, value in own if value is not None and name not in base}

    @torch.no_grad()
    def offset_weight(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """W - s B A, rounded once to the weight's dtype; a new tensor."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return (self.weight - self.scaling * (lora_B @ lora_A)).to(self.weight.dtype)

    @torch.no_grad()
    def rebase(self, lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> None:
        """Start from these adapters and their `offset_weight`; the old weight is not written."""
        offsets = [part.to(self.lora_A.dtype).clone() for part in (lora_A, lora_B)]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        self.offset_A, self.offset_B = offsets

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype that nn.Linear would return."""
        if self.training and self.lora_dropout.p > 0 and not self.merged:
            # Dropout gives the adapter another input than the base product has.
            return self._add_branch(self._base(x, self.bias), self.lora_dropout(self._wide(x)))
        return self._adapted(x, self.bias)

    def _adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + s B A)^T + b without dropout, W as an open window shows it."""
        window = self._window
        if window is None or not window.noisy:
            result = F.linear(x, self.weight, bias)
            return result if self.merged else self._add_branch(result, self._wide(x))
        if torch.compiler.is_compiling():
            # In plain operations the low-rank part is the compiler's to fuse.
            return self._add_branch(self._base(x, bias), self._wide(x))
        return noisy_product(window, x, self.weight, bias, *self.factors(), self.scaling)

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b, W as an open window shows it."""
        window = self._window
        if window is None or not window.noisy:
            return F.linear(x, self.weight, bias)
        return noisy_product(window, x, self.weight, bias)

    def _add_branch(self, result: Tensor, x: Tensor) -> Tensor:
        lora_A, lora_B = self.factors()
        branch = F.linear(F.linear(x, lora_A), lora_B)
        return (result + branch * self.scaling).to(result.dtype)

    def _wide(self, x: Tensor) -> Tensor:
        x = x.to(self.lora_A.dtype)
        return x if self.products is None else wide(x)

    def _merge(self, clean: Tensor) -> Tensor:
        """W + s B A in float32 or wider."""
        lora_A, lora_B = self.factors()
        return clean + (wide(lora_B) @ wide(lora_A)) * self.scaling

    def extra_repr(self) -> str:
        """Sizes and options, for print(model)."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"
        text += f", lora_alpha={self.lora_alpha:g}, bias={self.bias is not None}"
        text += ", use_rslora=True" if self.use_rslora else ""
        return text + (", merged=True" if self.merged else "")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            # The adapters are saved too: with the merged weight they would count twice.
            destination[prefix + "weight"] = self._clean_weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._require_unmerged(f"{prefix}weight")
        for part in ("A", "B"):
            # So that what was saved over an offset base loads into a fresh layer.
            if f"{prefix}offset_{part}" in state_dict and getattr(self, f"offset_{part}") is None:
                own = getattr(self, f"lora_{part}")
                setattr(self, f"offset_{part}", torch.zeros_like(own, requires_grad=False))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
