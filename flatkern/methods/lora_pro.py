"""LoRA-Pro: adjust the gradients of A and B so that they move W' as full fine-tuning would."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.methods._layers import Pair, lora_layers
from flatkern.methods.base import LossFn, Method
from flatkern.methods.fmlora import inverse_gram


class LoRAPro(Method):
    """Of all a, b for which s (B a + b A) is nearest to G, those nearest to the plain dA, dB.

    G is the gradient of W' = W + s B A, which is never formed: with dA = s B'G and dB = s G A',

        a = (B'B)^+ dA / s^2 + X A,   b = (dB - B (B'B)^+ B'dB) (A A')^+ / s^2 - B X,
        B'B X + X A A' = - (B'B)^+ dA A' / s^2.

    Then s (B a + b A) = P_B G + (1 - P_B) G P_A. At B = 0 only B moves. What the optimizer makes of
    a and b (Adam's moments, a scaler) is its own; the source's Adam keeps moments of m x n. Each
    pair of adapters is adjusted by itself; other parameters train as they are. Costs a few r x r
    systems. Source: Wang et al., "LoRA-Pro: are low-rank adapters properly optimized?", 2025,
    theorems 2.1 and 2.3, arXiv:2407.18242.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Adjust the adapters of every LoRALinear and PEFT LoRA layer.

        Args:
            model, optimizer, options: see `Method`.

        Raises:
            TypeError, ValueError: see `Method`; a model without such layers whose A and B are
                trained.
        """
        super().__init__(model, optimizer, **options)
        lora_layers(self, "pairs")

    def gradient(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean gradient, adjusted: a scaler's scale and the ranks' mean pass through."""
        loss = self.mean_gradient(loss_fn, batches)
        for layer in lora_layers(self, "pairs"):
            for pair in layer.pairs:
                if pair.learns:
                    a, b = adjusted(pair)
                    pair.A.grad.copy_(a)
                    pair.B.grad.copy_(b)
        return loss


@torch.no_grad()
def adjusted(pair: Pair) -> tuple[Tensor, Tensor]:
    """a [r, n] and b [m, r], float64: the Gram matrices square the condition number."""
    A, B, s = pair.A.detach().double(), pair.B.detach().double(), pair.scaling
    dA, dB = pair.A.grad.double(), pair.B.grad.double()
    gram_A, gram_B = A @ A.t(), B.t() @ B
    inverse_A, inverse_B = inverse_gram(gram_A, pair.A), inverse_gram(gram_B, pair.B)
    own = inverse_B @ dA / s**2
    X = sylvester(gram_B, gram_A, -(own @ A.t()))
    across = dB - B @ (inverse_B @ (B.t() @ dB))
    return own + X @ A, across @ inverse_A / s**2 - B @ X


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """X [r, r] with P X + X Q = C for symmetric P, Q >= 0; 0 where both say nothing."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p.clamp_min(0)[:, None] + q.clamp_min(0)
    cutoff = sums.max() * len(p) * torch.finfo(sums.dtype).eps
    inverse = torch.where(sums > cutoff, 1 / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0.0)
    return U @ ((U.t() @ C @ V) * inverse) @ V.t()
