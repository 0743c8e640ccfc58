"""GaLore beside Flat-LoRA: AdamW whose moments are of gradients projected to a low rank.

An optimizer, not a method: any method of `flatkern.methods` takes it.

    method = flatkern.methods.LoRA(model, galore_adamw(model, lr=1e-4, rank=128))

The optimizer is that of the package pytorch-optimizer.
"""

from typing import Any

import torch
from torch import nn

from flatkern.nn import shards
from flatkern.ops import _check

_OP = "galore_adamw"


def galore_adamw(
    model: nn.Module,
    lr: float,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    **options: Any,
) -> torch.optim.Optimizer:
    """AdamW over everything that is trainable, with the weights of linear layers projected.

    Every `update_proj_gap` steps P is taken from the gradient's singular vectors, r of them on the
    shorter side; moments are of P'G or G P, and a step is scale times theirs, projected back.
    Weights whose shorter side is at most r train as under AdamW, like embeddings and vectors.
    Source: Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank projection",
    2024, arXiv:2403.03507.

    Args:
        model: full fine-tuning: LoRA's own A and B have no rank to lose.
        lr: finite and above 0.
        rank: r, at least 1.
        update_proj_gap: at least 1.
        scale: the source's alpha, finite and above 0.
        options: `betas`, `weight_decay`, `eps` of `pytorch_optimizer.GaLore`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or nothing to project, or
            sharded weights.
        ImportError: pytorch-optimizer is not installed.
    """
    _check.kinds(_OP, nn.Module, model=model)
    _check.kinds(_OP, (float, int), lr=lr, scale=scale)
    _check.kinds(_OP, int, rank=rank, update_proj_gap=update_proj_gap)
    for name, value in (("lr", lr), ("scale", scale)):
        _check.finite(_OP, name, value, minimum=0.0)
        if value == 0:
            _check.refuse(_OP, name, "above 0", value)
    for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
        if value < 1:
            _check.refuse(_OP, name, "at least 1", value)
    try:
        from pytorch_optimizer import GaLore
    except ImportError as error:
        raise ImportError(
            f"{_OP} needs pytorch-optimizer: pip install pytorch-optimizer"
        ) from error
    wide = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and min(module.weight.shape) > rank
    }
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    projected = [weight for weight in trainable if id(weight) in wide]
    plain = [weight for weight in trainable if id(weight) not in wide]
    if not projected:
        raise ValueError(
            f"{_OP}: model must have trainable weights of linear layers whose shorter side is "
            f"above rank, got none above {rank}"
        )
    if any(map(shards.is_sharded, projected)):
        raise ValueError(
            f"{_OP}: model must not be sharded (FSDP, tensor parallelism): singular vectors are of "
            "a whole gradient; DDP leaves weights whole"
        )
    low_rank = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "scale": scale,
        "projection_type": "std",
    }
    groups = [{"params": projected, **low_rank}, *([{"params": plain}] if plain else [])]
    return GaLore(groups, lr=lr, **options)
