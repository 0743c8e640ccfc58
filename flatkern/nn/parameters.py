"""Low-rank adapters on parameters of modules that are no nn.Linear: stacked experts, Conv1D."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from flatkern.nn.factors import wide
from flatkern.nn.layouts import is_stack, is_transposed, transposed_blocks
from flatkern.nn.lookup import looking_up, looks_up
from flatkern.nn.merging import Mergeable
from flatkern.nn.shown import can_wait, showing
from flatkern.ops import _check

# What experts call their argument that says which of them get a token.
_ROUTES = ("top_k_index", "router_indices", "selected_experts")


class LoRAParameter(Mergeable):
    """W' = W + s B A of one frozen parameter, whatever its module computes with it.

    A module inside the parameter's own, which forwards W' for the length of each call; autograd
    keeps A and B, and makes W' again in backward. Inside a window of `flatkern.WeightNoise` W is
    noisy in it. The calls are those of the parameter's module, or of the nn.MultiheadAttention
    that reads it (out_proj.weight).

    Attributes:
        lora_A, lora_B: [r, n] and [m, r] of a matrix with m outputs, [k, r, n] and [k, m, r] of a
            stack of k; float32 over 16 bits, else of the weight's dtype.
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        parameter_name: of the parameter in its module.
        r, lora_alpha, use_rslora: as given.
        merged: whether the parameter holds W + s B A at the moment.
        quantized, takes_shards, linear: see `flatkern.nn.sites.Site`.
    """

    quantized = None
    takes_shards = True
    linear = False

    def __init__(
        self, holder: nn.Module, name: str, r: int, lora_alpha: float, use_rslora: bool
    ) -> None:
        """Adapters for `holder.name`, which passed `check_parameter`; A random, B zero."""
        super().__init__()
        # In a tuple, so that it is no submodule.
        self._holder = (holder,)
        self.parameter_name = name
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        weight = self.weight
        *stack, m, n = self._sizes()
        dtype = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
        like = {"device": weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty((*stack, r, n), **like))
        self.lora_B = nn.Parameter(torch.zeros((*stack, m, r), **like))
        for part in self.lora_A if stack else (self.lora_A,):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        self._start_unmerged()

    @property
    def holder(self) -> nn.Module:
        """The module that has the parameter."""
        return self._holder[0]

    @property
    def weight(self) -> Tensor:
        """W, as it lies."""
        return self.holder._parameters[self.parameter_name]

    def is_transposed(self) -> bool:
        """Whether the matrix, or each of the stack, is [in, out]."""
        own = self.holder, self.parameter_name
        if is_stack(self.holder, self.weight):
            return is_transposed(*own)
        return bool(transposed_blocks(*own))

    def _sizes(self) -> tuple[int, ...]:
        """[m, n] or [k, m, n], outputs before inputs."""
        shape = self.weight.shape
        if not is_stack(self.holder, self.weight):
            shape = shape[0], shape[1:].numel()
        *stack, m, n = shape
        return (*stack, n, m) if self.is_transposed() else (*stack, m, n)

    @contextlib.contextmanager
    def shown(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """The module's parameter is W' inside, W as an open window shows it.

        Yields what the module's forward is to be called with: args and kwargs, or, of an
        embedding, others, because W' is made of the rows that it looks up alone.
        """
        if self.merged:
            yield args, kwargs
            return
        holder, name, weight = self.holder, self.parameter_name, self.weight
        window = self._window if self._window is not None and self._window.noisy else None
        if args and looks_up(holder, name, args[0]) and not weight.requires_grad:
            with looking_up(window, holder, args[0], self._add) as places:
                yield (places, *args[1:]), kwargs
            return
        is_stack = window is not None and len(self._sizes()) > 2
        only = reached(holder, len(weight), args, kwargs) if is_stack else None
        with showing(window, holder, name, only=only, then=self._add):
            yield args, kwargs

    def _add(self, weight: Tensor, part: slice | Tensor) -> Tensor:
        """W + s B A of a part of dim 0, rounded once to the weight's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            if self.lora_A.dim() == 3:
                delta = wide(self.lora_B[part]) @ wide(self.lora_A[part])
                delta = delta.mT if self.is_transposed() else delta
            elif self.is_transposed():
                delta = (wide(self.lora_B) @ wide(self.lora_A)[:, part]).t()
            else:
                delta = wide(self.lora_B[part]) @ wide(self.lora_A)
            return (weight + self.scaling * delta.reshape(weight.shape)).to(weight.dtype)

    def _merge(self, clean: Tensor) -> Tensor:
        return self._add(clean, slice(0, len(clean)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of W'."""
        return self.lora_A, self.lora_B

    def operands(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s of W', as they are."""
        return self.lora_A, self.lora_B, self.scaling

    def row_factor(self) -> float:
        """The gradient of W is that of W'."""
        return 1.0

    def adapters(self) -> dict[str, nn.Parameter]:
        """A and B by name."""
        return dict(self._parameters)

    def extra_repr(self) -> str:
        """The parameter and the options, for print(model)."""
        sizes = ", ".join(map(str, self._sizes()))
        text = f"{self.parameter_name} [{sizes}], r={self.r}, lora_alpha={self.lora_alpha:g}"
        return text + (", merged=True" if self.merged else "")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The holder's parameters are there already. Alone, an adapter is saved without them.
        key = prefix.removesuffix(f"{_child(self.parameter_name)}.") + self.parameter_name
        if self.merged and key in destination:
            destination[key] = self._clean_weight

    def refuse_load(
        self, holder: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        """RuntimeError if a state_dict is being loaded over the merged weight."""
        self._require_unmerged(f"{prefix}{self.parameter_name}")


class _Forward:
    """In place of a module's forward: its own, with W' in the place of adapted parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.adapted: list[LoRAParameter] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.adapted, args, kwargs)

    def _call(
        self, adapted: list[LoRAParameter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not adapted:
            return type(self.module).forward(self.module, *args, **kwargs)
        with adapted[0].shown(args, kwargs) as (args, kwargs):
            return self._call(adapted[1:], args, kwargs)


def is_called(holder: nn.Module) -> bool:
    """Whether a module's own forward reads its parameters: not that of an attention's out_proj."""
    return not isinstance(holder, NonDynamicallyQuantizableLinear)


def readers_of(model: nn.Module, holder: nn.Module) -> list[nn.Module]:
    """The modules of the model whose forwards read the parameters of `holder`: itself, mostly."""
    if is_called(holder):
        return [holder]
    attentions = (each for each in model.modules() if isinstance(each, nn.MultiheadAttention))
    return [each for each in attentions if each.out_proj is holder]


def check_parameter(op: str, full: str, model: nn.Module, holder: nn.Module, name: str) -> None:
    """TypeError or ValueError unless a `LoRAParameter` can adapt `holder.name`."""
    weight = holder._parameters[name]
    what = f"{op}: target_parameters must be floating matrices, filters or stacks that a module "
    what += f"reads in its own forward, got {full}"
    if weight.dim() < 2 or weight.dtype not in _check.FLOAT_DTYPES:
        raise ValueError(f"{what} {list(weight.shape)} of {weight.dtype}")
    readers = readers_of(model, holder)
    if not readers:
        raise TypeError(f"{what}, which something else than nn.MultiheadAttention reads")
    for reader in readers:
        own = reader.__dict__.get("forward")
        if own is not None and not isinstance(own, _Forward):
            raise TypeError(f"{what} of a {type(reader).__name__} with a forward on the instance")
    if isinstance(holder, _ConvTransposeNd) or transposed_blocks(holder, name) > 1:
        raise TypeError(f"{what} of a {type(holder).__name__}")
    if hasattr(weight, "device_mesh"):
        raise TypeError(f"{what}, which is sharded")
    if isinstance(holder, nn.Embedding) and holder.max_norm is not None:
        raise ValueError(f"{what}, which max_norm writes in every forward")


def adapter_on(holder: nn.Module, name: str) -> LoRAParameter | None:
    """The adapter on `holder.name`, if there is one."""
    found = holder._modules.get(_child(name))
    return found if isinstance(found, LoRAParameter) else None


def adapt(model: nn.Module, adapter: LoRAParameter) -> LoRAParameter:
    """Put it into its module, which is one of the model's, and freeze the parameter."""
    holder, name = adapter.holder, adapter.parameter_name
    adapter.train(holder.training)
    holder.add_module(_child(name), adapter)
    # The holder loads its parameters before its children load theirs.
    holder.register_load_state_dict_pre_hook(adapter.refuse_load)
    for reader in readers_of(model, holder):
        if not isinstance(reader.__dict__.get("forward"), _Forward):
            reader.forward = _Forward(reader)
        reader.forward.adapted.append(adapter)
    holder._parameters[name].requires_grad_(False)
    return adapter


def _child(name: str) -> str:
    """What the holder of a parameter calls its adapter."""
    return f"{name}_lora"


def reached(
    module: nn.Module, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[int] | None:
    """Which of `count` experts get a token, if the module's forward is told; else None."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    route = next((given[name] for name in _ROUTES if name in given), None)
    if not isinstance(route, Tensor) or route.is_floating_point() or not can_wait(route):
        return None
    # Expert parallelism has an index past the last for experts elsewhere.
    return [index for index in route.unique().tolist() if index < count]
