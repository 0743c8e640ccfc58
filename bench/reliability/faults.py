"""Faults at any point of a training step, and what must hold behind each.

    python -m bench.reliability.faults --faults 10000 --seed 0

Each fault strikes a step of one `Case` at a point drawn at random: a line of flatkern's files, an
op before or behind it, a moment in time. Behind it the base weights have their exact bits, the
adapters too unless the optimizer had begun, and no window, hook, attribute, thread, mode or
generator is left; the same step run again gives, bit for bit, what the run without a fault gave.
Prints one line for each kind of fault, and what broke; ends with 1 if something did.
"""

import argparse
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bench.reliability.injectors import ERRORS, NEVER, Injector, Lines, Ops, Timer
from bench.reliability.subjects import TRAINERS, Case, Subject, cases, require
from flatkern import _backend
from flatkern.noise import registry

INJECTORS = ("line", "op", "behind an op", "moment")


def process_state() -> dict[str, Any]:
    """What a step must leave alone in the process."""
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "python's generator": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "saved tensors' hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "torch's threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "threads": threading.active_count(),
        "backend": _backend.named(),
        "trace": sys.gettrace(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "hooks of all modules": len(torch_module._global_forward_hooks),
    }


# By every Trainer, at its start.
SEEDED = ("torch's generator", "python's generator")


def make_injector(kind: str, at: int, error: Callable[[], BaseException]) -> Injector:
    if kind == "line":
        return Lines(at, error)
    if kind == "moment":
        return Timer(at, error)
    return Ops(at, error, behind=kind == "behind an op")


class Finding(NamedTuple):
    """A fault behind which something did not hold."""

    case: Case
    kind: str
    at: int
    error: str
    what: str


class Harness:
    """Strikes cases, with subjects that are made once and again behind a finding."""

    def __init__(self) -> None:
        self._subjects: dict[Case, Subject] = {}
        self._points: dict[tuple[Case, str], int] = {}

    def points(self, case: Case, kind: str) -> int:
        """How many points of that kind a step of the case has (microseconds: of a moment)."""
        if (case, kind) not in self._points:
            subject = self._subject(case)
            injector = make_injector(kind, NEVER, RuntimeError)
            start = time.perf_counter()
            error = subject.strike(injector)
            if error is not None:
                raise error
            passed = injector.passed
            if kind == "moment":
                passed = int(1e6 * (time.perf_counter() - start))
            subject.reset()
            self._points[case, kind] = passed
        return self._points[case, kind]

    def _subject(self, case: Case) -> Subject:
        if case not in self._subjects:
            self._subjects[case] = Subject(case)
        return self._subjects[case]

    def strike(self, case: Case, kind: str, at: int, error: str) -> tuple[str, Finding | None]:
        """One fault: what became of it, and what it broke."""
        subject = self._subject(case)
        before = process_state()
        injector = make_injector(kind, at, ERRORS[error])
        came = subject.strike(injector)
        del came
        outcome = "raised" if injector.struck else "not reached"
        try:
            now = process_state()
            for name, value in now.items():
                if name not in SEEDED or case.work not in TRAINERS:
                    require(value == before[name], f"{name}: {str(value)[:80]}")
            subject.check()
        except Exception as failure:  # a finding, whatever it is
            del self._subjects[case]
            _sweep(subject)
            what = "".join(traceback.format_exception_only(failure)).strip()
            return outcome, Finding(case, kind, at, error, what)
        return outcome, None


def _sweep(subject: Subject) -> None:
    """Let what a finding left behind not be found again."""
    for noise in list(registry._OPEN):
        noise.discard()
        registry.unregister(noise)
    torch.set_grad_enabled(True)
    _backend._named = "auto"


def draw(faults: int, seed: int, chosen: list[Case], harness: Harness) -> Iterator[tuple]:
    """(case, kind, at, error) of each: cases in turn, the rest by chance."""
    chance = random.Random(seed)
    order = chosen[:]
    chance.shuffle(order)
    for number in range(faults):
        case = order[number % len(order)]
        kind = INJECTORS[number // len(order) % len(INJECTORS)]
        errors = [e for e in ERRORS if kind != "moment" or e in ("KeyboardInterrupt", "SystemExit")]
        yield case, kind, chance.randint(1, harness.points(case, kind)), chance.choice(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default="", help="only cases whose text has this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [case for case in cases() if options.cases in str(case)]
    harness, counts, findings = Harness(), Counter(), []
    start = time.time()
    for case, kind, at, error in draw(options.faults, options.seed, chosen, harness):
        outcome, finding = harness.strike(case, kind, at, error)
        counts[kind, outcome] += 1
        if finding is not None:
            findings.append(finding)
            print(f"FOUND {finding}", flush=True)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:>14} {outcome:>12} {count:6}")
    minutes = (time.time() - start) / 60
    print(f"{options.faults} faults, {len(chosen)} cases, seed {options.seed}, {minutes:.1f} min")
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
