"""`flatkern bench`: the ops on this machine, beside eager PyTorch and a copy of the same bytes."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import flatkern
from flatkern import baselines, ops
from flatkern._memory import peak_bytes
from flatkern.ops.residual import is_available

SCALING, SIGMA = 2.0, 0.05
PROVIDERS = ("flatkern", "published", "eager", "copy", "lora")


@dataclass
class Row:
    """One op: the fastest times in ms by provider, and the most bytes that flatkern allocates."""

    op: str
    backend: str
    flatkern: float
    published: float | None
    eager: float | None
    copy: float | None
    lora: float | None
    peak_bytes: int

    def cells(self) -> dict[str, object]:
        """The row of the table: ratios are times over flatkern's."""
        ratio = {name: getattr(self, name) for name in ("published", "eager")}
        return {
            "op": self.op,
            "by": self.backend,
            "ms": f"{self.flatkern:.3g}",
            "x copy": f"{self.flatkern / self.copy:.2f}" if self.copy else "",
            "x plain LoRA": f"{self.flatkern / self.lora:.2f}" if self.lora else "",
            **{f"vs {k}": f"{v / self.flatkern:.1f}x" if v else "" for k, v in ratio.items()},
            "peak MiB": f"{self.peak_bytes / 2**20:.3g}",
        }


class Case:
    """One weight with adapters, and what each provider does to it."""

    def __init__(self, rows: int, cols: int, rank: int, tokens: int, **like: object) -> None:
        """Random values; `like` is the weight's dtype and device."""
        device = like["device"]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.weight = (normal(rows, cols) / math.sqrt(cols)).to(like["dtype"])
        self.adapters = normal(rank, cols) / math.sqrt(cols), normal(rows, rank) * 0.01, SCALING
        self.x = normal(tokens, cols).to(like["dtype"])
        self.key = flatkern.NoiseKey(seed=1, step=2, tensor=3).to(device)
        self.row_scale = ops.row_norm(self.weight, *self.adapters) * (SIGMA / math.sqrt(cols))
        self.room = torch.empty_like(self.weight)
        self.residual = ops.new_residual(self.weight) if is_available(self.weight) else None

    def runs(self) -> dict[str, dict[str, Callable[[], object]]]:
        """What to time, by op and provider; what undoes what the op before it did runs next."""
        w, c, key = self.weight, self.row_scale, self.key
        copies = {"copy": lambda: self.room.copy_(w)}
        found = {
            "row_norm": {
                "flatkern": lambda: ops.row_norm(w, *self.adapters),
                "published": lambda: baselines.published_row_norm(w, *self.adapters),
                "eager": lambda: baselines.eager_row_norm(w, *self.adapters),
            },
            "perturb": {
                "flatkern": lambda: ops.perturb(w, c, key, out=self.room),
                "eager": lambda: baselines.eager_perturb_(self.room, c),
            },
            "window in place, norm and restore included": {
                "flatkern": self._window,
                "published": self._published_window,
                "eager": self._eager_window,
            },
            "noisy_linear, forward and backward": {
                "flatkern": lambda: self._backward(self._noisy),
                "eager": lambda: self._backward(self._eager_noisy),
                "lora": lambda: self._backward(self._lora),
            },
        }
        return {op: own if "lora" in own else own | copies for op, own in found.items()}

    def check(self) -> None:
        """RuntimeError unless norms are right and a window gives the exact bits back."""
        lora_A, lora_B, scaling = self.adapters
        merged = self.weight.double() + scaling * lora_B.double() @ lora_A.double()
        norm = ops.row_norm(self.weight, *self.adapters).double()
        before = self.weight.clone()
        self._window()
        same = torch.equal(before, self.weight) or self.residual is None
        if not (torch.allclose(norm, merged.norm(dim=1), rtol=1e-5) and same):
            raise RuntimeError("flatkern bench: wrong results; please report this machine")
        self.weight.copy_(before)

    def _window(self) -> None:
        lora_A, lora_B, scaling = self.adapters
        options = {} if self.residual is None else {"residual": self.residual}
        w, key = self.weight, self.key
        c = ops.perturb_merged_(w, lora_A, lora_B, scaling, SIGMA, key, **options)
        ops.restore_(w, c, key, **options)

    def _published_window(self) -> None:
        norm = baselines.published_perturb_(self.room, *self.adapters, SIGMA, 0)
        baselines.published_restore_(self.room, norm, SIGMA, 0)

    def _eager_window(self) -> None:
        kept = self.weight.clone()
        baselines.eager_perturb_merged_(self.weight, *self.adapters, SIGMA)
        self.weight.copy_(kept)

    def _noisy(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        operands = self.weight, None, lora_A, lora_B, SCALING, self.row_scale, self.key
        return ops.noisy_linear(x, *operands)

    def _lora(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return baselines.lora_linear(x, self.weight, lora_A, lora_B, SCALING)

    def _eager_noisy(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        operands = lora_A, lora_B, SCALING, self.row_scale
        return baselines.eager_noisy_linear(x, self.weight, *operands)

    def _backward(self, layer: Callable[..., Tensor]) -> None:
        leaves = [t.detach().requires_grad_() for t in (self.x, *self.adapters[:2])]
        layer(*leaves).sum().backward()


def measure(
    rows: int = 4096,
    cols: int = 4096,
    rank: int = 16,
    tokens: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
) -> list[Row]:
    """Time every op beside its baselines, each for about `seconds` in both orders.

    The global random generator is put back: the baselines use it.

    Args:
        rows, cols: of the weight.
        rank: of its adapters.
        tokens: that the layer takes.
        dtype: of the weight, a floating-point one that the ops take.
        device: where it lies.
        seconds: for each of the two timings of an op by one provider.

    Raises:
        RuntimeError: an op gave a wrong result; nothing was timed.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        case = Case(rows, cols, rank, tokens, dtype=dtype, device=device)
        case.check()
        backend = flatkern._backend.resolve(device.type, dtype)
        return [_row(op, backend, runs, device, seconds) for op, runs in case.runs().items()]


def _row(
    op: str,
    backend: str,
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
) -> Row:
    fastest = dict.fromkeys(PROVIDERS)
    for name in (*runs, *reversed(runs)):
        # Timer waits for a GPU, and sets one thread unless told otherwise.
        timer = Timer("run()", globals={"run": runs[name]}, num_threads=torch.get_num_threads())
        timer.timeit(1)
        times = timer.adaptive_autorange(max_run_time=seconds, min_run_time=seconds / 10).times
        fastest[name] = min(fastest[name] or math.inf, min(times) * 1e3)
    return Row(op, backend, **fastest, peak_bytes=peak_bytes(runs["flatkern"], device.type))


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    """Plain values."""
    return [asdict(row) for row in rows]
