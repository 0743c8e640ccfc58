"""How much memory a piece of work needs at its peak."""

from collections.abc import Callable

import torch


def peak_bytes(fn: Callable[[], object], device: torch.device | str) -> int:
    """Peak bytes that torch allocates on `device` during `fn()`, above what it held before.

    Only torch's own allocations count: on the CPU they come from the profiler's allocator events,
    on CUDA from the allocator's statistics. What `fn` returns is counted like any temporary.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_peak(fn)
    if device.type == "cuda":
        return _cuda_peak(fn, device)
    raise ValueError(f"peak_bytes: device must be cpu or cuda, got {device}")


def _cpu_peak(fn: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = fn()
    del result
    # The public event list folds allocations into the operator that made them, as a net sum, in
    # which a temporary vanishes. The raw events carry one signed size per malloc and free.
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def _cuda_peak(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
