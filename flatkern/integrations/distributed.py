"""Tensor parallelism for `LoRALinear`: plans for torch's `parallelize_module`.

DDP and FSDP2 (`fully_shard`) need nothing from here, and PEFT's layers take torch's own styles
(docs/distributed.md). Whatever cuts the weights, an element's noise depends on its place in the
whole weight: the noise is that of one process.

    plan = {"q_proj": LoRAColwise(), "o_proj": LoRARowwise()}
    parallelize_module(layer, mesh, plan)
"""

from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from flatkern.nn import LoRALinear
from flatkern.ops import _check


class LoRAColwise(ColwiseParallel):
    """torch's `ColwiseParallel` for a `LoRALinear`: each rank has rows of W, of B and of b.

    A is on every rank. Layouts of input and output: as `ColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placements = {"weight": Shard(0), "bias": Shard(0), "lora_B": Shard(0)}
        return _distribute(self, module, device_mesh, placements, Replicate())


class LoRARowwise(RowwiseParallel):
    """torch's `RowwiseParallel` for a `LoRALinear`: each rank has columns of W and of A.

    B and b are on every rank. Layouts of input and output: as `RowwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placements = {"weight": Shard(1), "lora_A": Shard(1)}
        return _distribute(self, module, device_mesh, placements, Shard(-1))


def _distribute(
    style: ParallelStyle,
    module: nn.Module,
    device_mesh: DeviceMesh,
    placements: dict[str, Placement],
    input_layout: Placement,
) -> nn.Module:
    """Replace the parameters by DTensors; those without a placement are on every rank."""
    op = type(style).__name__
    if type(module) is not LoRALinear:
        raise TypeError(f"{op}: module must be a LoRALinear, got {type(module).__name__}")
    module.require_closed("parallelize_module")
    if module.merged:
        raise RuntimeError(f"{op}: module is merged; call unmerge() first")
    if module.lora_dropout.p > 0:
        # Copies of the input on several ranks would lose different elements.
        _check.refuse(op, "lora_dropout", "0 under tensor parallelism", module.lora_dropout.p)

    def cut(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for own, value in list(part.named_parameters(recurse=False)):
            placement = [placements.get(own, Replicate())]
            placed = distribute_tensor(value, mesh, placement, src_data_rank=style.src_data_rank)
            part.register_parameter(own, nn.Parameter(placed, requires_grad=value.requires_grad))

    # As in the styles of torch.
    layouts = style.input_layouts, (input_layout,)
    return distribute_module(
        module,
        device_mesh,
        cut,
        partial(style._prepare_input_fn, *layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
