import gc
import os
from dataclasses import dataclass

# Before torch loads. Threads that wait in a spin take the tests three times as long on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As many threads in all workers as there are cores: more take a quarter of their time to meet.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
# cuBLAS asks for this before it runs under deterministic algorithms (poison_uninitialised).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import quick_interpreter
import torch

import flatkern
from flatkern import _backend

# Collection makes little garbage; on again behind it.
gc.disable()
if _backend.TRITON_INTERPRETED:
    quick_interpreter.quicken()


@dataclass(frozen=True)
class Implementation:
    """One implementation of every op, and what its tests may expect of it."""

    name: str
    # In order of preference: Triton runs on CPU tensors where its interpreter is switched on.
    device_types: tuple
    # e = c*z is one product inside the radius: perturb is near float32(c*z) + W, not equal to it.
    folds_scale: bool
    float64: bool
    # Denormals survive torch.set_flush_denormal(True).
    ignores_flush_denormal: bool
    # No temporary of the weight's size anywhere.
    streams: bool
    # Exact in-place restore: perturb_ can fill a residual.
    residual: bool

    @property
    def own_products(self):
        """Its matrix products are its own: a row's bits do not depend on its place among others."""
        return not (self.name == "triton" and _backend.TRITON_INTERPRETED)

    @property
    def device(self):
        """Where its tensors live, or None if it cannot run here."""
        for device_type in self.device_types:
            if self.name in flatkern.available_backends(device_type):
                return torch.device(device_type)
        return None


IMPLEMENTATIONS = (
    Implementation("reference", ("cpu",), False, True, False, False, True),
    Implementation("cpu", ("cpu",), False, False, True, True, True),
    Implementation("cuda", ("cuda",), True, False, True, True, True),
    Implementation("triton", ("cuda", "cpu"), True, False, True, True, False),
)

# The files that take longest come first, so that no worker is left with one of them at the end.
LONGEST = (
    "triton/test_interpreted.py",
    "csrc/test_cuda_emulated.py",
    "bench/test_gpu_script.py",
    "integrations/test_distributed.py",
    "noise/test_window_compile.py",
    "csrc/test_isa.py",
    "csrc/test_cuda_residual.py",
    "csrc/test_sass.py",
)

# Names that must run: where they cannot, their tests fail, so that a broken build cannot pass; of
# others there are none.
REQUIRED = os.environ.get("FLATKERN_TEST_REQUIRE", "reference").split(",")


def pytest_report_header():
    absent = [each.name for each in IMPLEMENTATIONS if each.device is None]
    return [f"flatkern: no tests of {name}: {why_unusable(name)}" for name in absent]


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        found = (i for i, name in enumerate(LONGEST) if path.endswith(f"tests/{name}"))
        return next(found, len(LONGEST))

    items.sort(key=place)
    # What is imported and collected by now stays: the garbage collector need not walk it again.
    gc.collect()
    gc.freeze()
    gc.enable()


def why_unusable(name):
    try:
        with flatkern.backend(name):
            return "its devices are absent"
    except RuntimeError as error:
        return str(error)


@pytest.fixture(
    params=[each for each in IMPLEMENTATIONS if each.device is not None or each.name in REQUIRED],
    ids=lambda implementation: implementation.name,
)
def implementation(request):
    """Each implementation that can or must run here in turn, forced with flatkern.backend."""
    chosen = request.param
    if chosen.device is None:
        reason = f"{chosen.name}: {why_unusable(chosen.name)}"
        pytest.fail(f"FLATKERN_TEST_REQUIRE names an implementation that cannot run: {reason}")
    with flatkern.backend(chosen.name):
        yield chosen


@pytest.fixture
def device(implementation):
    return implementation.device


@pytest.fixture(autouse=True)
def poison_uninitialised():
    """torch.empty is filled with NaN (the largest integer), so that an unwritten output is seen."""
    # This one, unlike torch.use_deterministic_algorithms, does not import the compiler.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture
def threads():
    """Set the number of CPU threads inside one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
