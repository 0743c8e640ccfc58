"""What stands between a PEFT layer and a noise window."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import adalora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from flatkern.integrations import quantized
from flatkern.integrations._peft_reasons import DORA, is_plain
from flatkern.nn import shards
from flatkern.nn.factors import adalora_factors, wide
from flatkern.nn.sites import ATTRIBUTE, CLOSE_FIRST, noisy_product

# Under which PEFT's modules have what they wrap.
_BASES = ("base_layer", "original_module")


class Bystander:
    """PEFT's parameters in a module whose base weight no window shows; they are numbered apart."""

    weight = None
    quantized = None

    def __init__(self, layer: nn.Module) -> None:
        """A tuner layer, or a wrapper such as that of `modules_to_save`."""
        self.layer = layer
        setattr(layer, ATTRIBUTE, self)

    def adapters(self) -> dict[str, nn.Parameter]:
        """All but the base's parameters."""
        own = self.layer.__dict__["_modules"]
        shared = {id(part) for name in _BASES if name in own for part in own[name].parameters()}
        # By name as well: PEFT's MultiheadAttention makes new parameters whenever it is listed.
        return {
            name: value
            for name, value in self.layer.named_parameters()
            if id(value) not in shared and name.split(".")[0] not in _BASES
        }

    def require_clean(self, action: str) -> None:
        """No window is ever open here."""

    def detach(self) -> None:
        """Leave the module as it was."""
        self.layer.__dict__.pop(ATTRIBUTE, None)


class PeftSite(Bystander):
    """A PEFT layer whose base product a window can make noisy; see `flatkern.nn.sites.Site`.

    `base_layer.forward`, `merge`, `unmerge` and `update_layer` are replaced on the instances;
    PEFT's own branch runs as it is. DoRA's denominator is that of the clean weights for as long as
    a window is open.
    """

    # Of `holder`.
    parameter = "weight"
    linear = True

    def __init__(self, layer: nn.Module) -> None:
        """A layer that `why_not` accepts."""
        self._window: Any = None
        self._attached = True
        self.quantized = quantized.stored(layer.base_layer)
        # Of PEFT's forward only the base product has to know; DoRA's rows are whole where FSDP
        # gathers.
        self.takes_shards = self.quantized is None
        # What undoes a `merge` in a pause to the bit.
        self._put_back: Callable[[], None] | None = None
        # By adapter: ||V|| of the open window, and what was put on the DoRA module.
        self._norms: dict[str, Tensor] = {}
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        # A forward of transformers' tensor parallelism, and the same around this one's.
        self._styled: Any = layer.base_layer.__dict__.get("forward")
        self._restyled: Any = None
        # From here on `detach` undoes what an interrupt left of the rest.
        super().__init__(layer)
        if self.quantized is not None:
            self.quantized.hold()
        self._kind = self.holder, type(self.weight), self.weight.dtype
        self._stand_in()
        layer.merge, layer.unmerge = self._merge, self._unmerge
        layer.update_layer = self._update_layer

    def _stand_in(self) -> None:
        """Replace the forward whose weight a window shows."""
        base = self.layer.base_layer
        base.forward = self._base_forward
        if self._styled is not None:
            self._restyle(base)

    def _stand_back(self) -> None:
        """Undo `_stand_in`."""
        base = self.layer.base_layer
        base.__dict__.pop("forward", None)
        if self._styled is not None:
            base.forward = self._styled

    @property
    def holder(self) -> nn.Module:
        """The module whose `parameter` is the base weight."""
        return self.layer.base_layer

    @property
    def weight(self) -> Tensor:
        """The base weight, as it is stored."""
        return getattr(self.holder, self.parameter)

    def _rows(self) -> tuple[int, ...]:
        """The sizes of the matrix, or the stack of matrices, that W' is: outputs before inputs."""
        return self.layer.base_layer.out_features, self.layer.base_layer.in_features

    @property
    def merged(self) -> bool:
        """Whether PEFT has merged an adapter into the weight."""
        return self.layer.merged

    @property
    def scaling(self) -> float:
        """s of the active adapter; 1 where `factors` contains it."""
        return self._scaled_factors()[2]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the active adapters, one below (beside) the other."""
        return self._scaled_factors()[:2]

    def operands(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the active adapters, as they are."""
        return self._scaled_factors()

    def row_factor(self) -> Tensor | float:
        """d of W' = diag(d) (W + s B A): DoRA's mu / ||V|| of the open window, else 1."""
        magnitudes = getattr(self.layer, "lora_magnitude_vector", {})
        for name in self._active():
            if name in magnitudes:
                return magnitudes[name].weight.flatten() / self._norms[name]
        return 1.0

    def _active(self) -> list[str]:
        if self.layer.disable_adapters:
            return []
        return [name for name in self.layer.active_adapters if name in self._factors_of()]

    def _factors_of(self) -> Any:
        """What has an A for each adapter."""
        return self.layer.lora_A

    def _scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        parts = [self._of_adapter(name) for name in self._active()]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            *stack, rows, cols = self._rows()
            shapes = (*stack, 1, cols), (*stack, rows, 1)
            zeros = (torch.zeros(shape, device=self.weight.device) for shape in shapes)
            return *zeros, 1.0
        # Wide, because s B rounded to 16 bits would be off by more than the norms are.
        lora_A = torch.cat([lora_A for lora_A, _, _ in parts], dim=-2)
        return lora_A, torch.cat([wide(lora_B) * s for _, lora_B, s in parts], dim=-1), 1.0

    def _of_adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        # A tensor after PEFT's prepare_model_for_compiled_hotswap.
        scaling = float(layer.scaling[name])
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        if isinstance(layer, adalora.AdaLoraLayer):
            rank = float(shards.whole(layer.ranknum[name]))
            return adalora_factors(lora_A, lora_B, layer.lora_E[name], scaling, rank)
        return lora_A.weight, lora_B.weight, scaling

    def _restyle(self, base: nn.Linear) -> None:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

        ALL_PARALLEL_STYLES[base._hf_tp_plan].install_forward(base, base._hf_device_mesh)
        self._restyled, base.forward = base.forward, self._styled_forward

    def _styled_forward(self, x: Tensor) -> Tensor:
        """`_base_forward` under tensor parallelism."""
        if self._window is None or torch.is_grad_enabled():
            return self._restyled(x)
        # Without gradients the style puts bare parts in the module, which know no place.
        with torch.enable_grad():
            return self._restyled(x).detach()

    def _base_forward(self, x: Tensor) -> Tensor:
        """x W^T + b, W as an open window shows it; with the adapters disabled, clean."""
        layer, window = self.layer, self._window
        # Not through Module.__getattr__, which costs three times what is looked up.
        base = layer._modules["base_layer"]
        if window is None:
            return type(base).forward(base, x)
        if window.perturbed and layer.disable_adapters:
            return F.linear(x, self._clean_weight(window), base.bias)
        if not window.noisy or layer.disable_adapters:
            return type(base).forward(base, x)
        if self.quantized is not None:
            return quantized.noisy_product(window, x, self.quantized)
        own = base._parameters
        product = noisy_product(window, x, own["weight"], own["bias"])
        # AdaLoRA adds in place, which autograd refuses on the op's output.
        return product.clone() if isinstance(layer, adalora.SVDLinear) else product

    def _clean_weight(self, window: Any) -> Tensor:
        if window.perturbed and window.sharded_linear and not shards.is_sharded(self.weight):
            raise RuntimeError(
                "peft: a forward with disabled adapters in a window in place, of weights that FSDP "
                'has gathered with their noise; use paused() or mode="virtual"'
            )
        return window.clean_weight()

    def enter_window(self, window: Any) -> None:
        """Note DoRA's ||V||, because the weight may be noisy afterwards."""
        magnitudes = getattr(self.layer, "lora_magnitude_vector", {})
        for name, dora in magnitudes.items():
            self._enter_dora(name, dora)
        self._window = window

    def _enter_dora(self, name: str, dora: nn.Module) -> None:
        *operands, scaling = self._dora_operands(name)
        norm = shards.row_norms(*([one.detach()] for one in operands), [scaling])[0]
        if name not in self._norms or self._norms[name].device != norm.device:
            # An ordinary tensor even in inference mode: autograd saves it.
            with torch.inference_mode(False):
                self._norms[name] = torch.empty_like(norm)
        self._norms[name].copy_(norm)
        if "get_weight_norm" not in dora.__dict__:
            dora.get_weight_norm = _CleanNorm(self, name, dora)
            hook = dora.register_forward_pre_hook(self._show_dora, with_kwargs=True)
            self._hooks.append((dora, hook))

    def _dora_operands(self, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """W, A, B and s of V = W + s B A, a row for each of the magnitudes."""
        stored = self.quantized
        weight = self._by_row() if stored is None else stored.dequantize(torch.float32)
        return weight, *self._of_adapter(name)

    def _by_row(self) -> Tensor:
        """The weight [m, n], a row for each output."""
        return self.weight

    def _show_dora(
        self, dora: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """With dropout DoRA multiplies by the weight itself: give it the noisy product instead."""
        window, x = self._window, args[0]
        if window is not None and window.noisy and kwargs.get("base_result", 0) is None:
            dtype = self.weight.dtype if self.quantized is None else x.dtype
            product = self._base_forward(x.to(dtype)).to(x.dtype)
            kwargs = kwargs | {"base_result": product}
        return args, kwargs

    def require_closed(self, action: str) -> None:
        """RuntimeError while a window is open, after `detach`, or where no window makes sense."""
        self.require_clean(action)
        if not self._attached:
            raise RuntimeError(f"peft: {action} after detach; attach again")
        self._require_same_base(action)
        variants = getattr(self.layer, "lora_variant", {})
        active = [variants.get(name) for name in self._active()]
        for variant in filter(None, active):
            if len(active) > 1 or not isinstance(variant, DORA):
                what = f"{type(variant).__name__}, alone or beside another active adapter"
                raise RuntimeError(f"peft: {action} with {what}; only a lone DoRA takes noise")

    def _merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; in a pause of a window its `unmerge` will bring the exact bits back."""
        self._require_hidden("merge")
        if self._window is not None and not self.merged:
            stored = self.quantized
            self._put_back = self._copied() if stored is None else stored.keep()
        try:
            type(self.layer).merge(self.layer, *args, **kwargs)
        finally:
            if not self.merged:
                self._put_back = None

    def _unmerge(self) -> None:
        self._require_hidden("unmerge")
        type(self.layer).unmerge(self.layer)
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def _require_hidden(self, action: str) -> None:
        """RuntimeError where a window shows noise, or has it written in the weight."""
        window = self._window
        if window is not None and (window.noisy or window.perturbed):
            raise RuntimeError(
                f"peft: {action} inside a noise window; use paused(), or {CLOSE_FIRST}"
            )

    def _update_layer(self, *args: Any, **kwargs: Any) -> None:
        """What adds an adapter, some starts of which read or write the weight."""
        if self._window is not None and self._window.perturbed:
            raise RuntimeError(
                "peft: adding an adapter while in-place noise is written in the base weight; "
                "close the window or use paused()"
            )
        type(self.layer).update_layer(self.layer, *args, **kwargs)

    def _require_same_base(self, action: str) -> None:
        """RuntimeError if the base layer, or how its weight is stored, is not what it was."""
        base = self.holder
        kind = base, type(self.weight), self.weight.dtype
        if kind == self._kind:
            return
        now = quantized.stored(base)
        if base is not self._kind[0]:
            found = f"another one, {type(base).__name__}"
        elif type(now) is not type(self.quantized):
            found = "stored as " + (str(self.weight.dtype) if now is None else now.format)
        elif now is None and not is_plain(self.weight):
            found = f"a {type(self.weight).__name__} of {self.weight.dtype}"
        else:
            self._kind = kind
            return
        raise RuntimeError(
            f"peft: {action}: the base layer was changed after attach, it is now {found}; "
            "call detach(model) and attach(model) again"
        )

    def _copied(self) -> Callable[[], None]:
        """What puts the present bits of weight and bias back."""
        names = [self.parameter]
        if self.parameter == "weight" and getattr(self.holder, "bias", None) is not None:
            names.append("bias")
        kept = [(name, getattr(self.holder, name).detach().clone()) for name in names]

        @torch.no_grad()
        def put_back() -> None:
            for name, bits in kept:
                getattr(self.holder, name).copy_(bits)

        return put_back

    def require_clean(self, action: str) -> None:
        """RuntimeError while a window is open."""
        if self._window is not None:
            raise RuntimeError(f"peft: {action} inside a noise window; {CLOSE_FIRST}")

    def detach(self) -> None:
        """Leave the layer as it was."""
        self._attached = False
        self._stand_back()
        if self.quantized is not None:
            self.quantized.release()
        for name in ("merge", "unmerge", "update_layer"):
            self.layer.__dict__.pop(name, None)
        for dora, hook in self._hooks:
            hook.remove()
            dora.__dict__.pop("get_weight_norm", None)
        super().detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has no part in an open window."""
        return self.__dict__ | {"_window": None}


class _CleanNorm:
    """In place of a DoRA module's `get_weight_norm`: in a window, what the window noted."""

    def __init__(self, site: PeftSite, name: str, dora: nn.Module) -> None:
        self._site, self._name, self._dora = site, name, dora

    def __call__(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the magnitudes lie, in the weight's dtype."""
        window = self._site._window
        if window is not None and (window.noisy or window.perturbed):
            norms = self._site._norms[self._name].to(weight.dtype)
            return norms.view(self._dora.weight.shape)
        return type(self._dora).get_weight_norm(self._dora, weight, *args, **kwargs)
