"""Triton's kernels, compiled ahead of time exactly as the launchers would have them compiled."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass import Report, analyse
from flatkern import triton as kernels
from flatkern.triton.noise import noise_kernel, philox_bits_kernel, uniform_kernel
from flatkern.triton.perturb import perturb_kernel
from flatkern.triton.perturb_plane import perturb_plane_kernel
from flatkern.triton.row_norm import row_norm_kernel, row_norm_parts_kernel

JIT = (
    noise_kernel,
    philox_bits_kernel,
    uniform_kernel,
    perturb_kernel,
    perturb_plane_kernel,
    row_norm_kernel,
    row_norm_parts_kernel,
)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROWS, COLS = 64, 4096


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def record(call: Callable[[], object]) -> Launch:
    """What `call` would launch last; nothing runs."""
    launches = []

    def run_of(kernel):
        def run(*args, grid, warmup, **kwargs):
            names = kernel.arg_names
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            options = {name: given.pop(name) for name in list(given) if name not in names}
            launches.append(Launch(kernel, given, options))

        return run

    patches = [mock.patch.object(kernel, "run", run_of(kernel)) for kernel in JIT]
    for patch in patches:
        patch.start()
    try:
        call()
    finally:
        for patch in patches:
            patch.stop()
    return launches[-1]


def compile_for(launch: Launch, arch: int) -> bytes:
    """The cubin that Triton's just-in-time compiler would make of a launch, by its rules.

    Pointers and integers that 16 divides are known as such, integers that are 1 are constants,
    unless the kernel says not to specialise on them.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            fits = -(2**31) <= value < 2**31
            signature[name], divisible = "i32" if fits else "i64", special and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    target = GPUTarget("cuda", arch, 32)

    def current_target():
        return target

    # Kernels that choose by capability ask the GPU that is there, if any, not the target.
    current_target.__triton_builtin__ = True
    with mock.patch("triton.language.target_info.current_target", current_target):
        return triton.compile(source, target=target, options=launch.options).asm["cubin"]


def tensor(dtype: torch.dtype, rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    return torch.empty((rows, cols), dtype=dtype)


def cases() -> dict[str, tuple[Callable[[], object], int]]:
    """Name of each kernel in each form that matters: a call, and the bytes of what it stores."""
    key, scale = torch.empty(4, dtype=torch.int64), torch.empty(ROWS)
    found: dict[str, tuple[Callable[[], object], int]] = {
        "noise": (lambda: kernels.noise(ROWS, COLS, key), 4),
        "philox_bits": (lambda: kernels.philox_bits(ROWS, COLS, key), 8),
        "uniform": (lambda: kernels.uniform(ROWS, COLS, key), 4),
    }
    for dtype, name in NAMES.items():
        size = dtype.itemsize
        weight = tensor(dtype)

        def in_place(op, weight=weight, **options):
            return lambda: op(weight, scale, key, **options)

        def cast(lower, weight=weight):
            return lambda: kernels.perturb(weight, scale, key, dtype=lower)

        # An odd width of rows: one element at a time.
        unaligned = tensor(dtype, cols=COLS - 1)
        found[f"perturb_ {name}"] = in_place(kernels.perturb_), size
        found[f"perturb_ {name} unaligned"] = in_place(kernels.perturb_, unaligned), size
        found[f"restore_ {name}"] = in_place(kernels.restore_), size
        found[f"perturb_ {name} elementwise"] = in_place(kernels.perturb_, elementwise=True), size
        found[f"restore_ {name} elementwise"] = in_place(kernels.restore_, elementwise=True), size
        out, two = torch.empty_like(weight), torch.empty(2, ROWS)
        keys = torch.empty(2, 4, dtype=torch.int64)

        def plane(weight=weight, out=out, two=two, keys=keys):
            kernels.perturb_plane(weight, two, keys, out=out)

        found[f"perturb_plane {name}"] = plane, size
        for lower in (torch.bfloat16, torch.float16):
            if lower != dtype:
                found[f"perturb {name} to {NAMES[lower]}"] = cast(lower), lower.itemsize
        for rank in (0, 16, 64):

            def norm(weight=weight, rank=rank):
                kernels.row_norm(weight, *adapters(rank), 2.0)

            if name == "bfloat16" or rank == 16:
                found[f"row_norm {name} rank {rank}"] = norm, size
    return found


def adapters(rank: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """float32, as PEFT has them over any weight."""
    if rank == 0:
        return None, None
    return tensor(torch.float32, rank, COLS), tensor(torch.float32, ROWS, rank)


def report(name: str, arch: int) -> Report:
    """Compile and analyse one case."""
    call, size = cases()[name]
    return report_of(record(call), arch, size, name)


def report_of(launch: Launch, arch: int, element_bytes: int, name: str) -> Report:
    """Compile and analyse one launch."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compile_for(launch, arch))
        (found,) = analyse(cubin, element_bytes)
    return replace(found, kernel=f"Triton {name}")


def reports(wanted: Iterable[tuple[str, int]]) -> list[Report]:
    """Reports of (case, architecture) pairs, in their order, on all cores."""
    # Spawned: a fork of a process in which torch has started threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(report, *zip(*wanted, strict=True)))


def versions() -> dict[str, str]:
    """The compilers that made the numbers."""
    return {"triton": triton.__version__, "torch": torch.__version__}
