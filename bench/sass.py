"""What the compilers made of the kernels: instructions per element, access widths, spills.

`python -m bench.sass` compiles every Triton kernel ahead of time, reads the CUDA kernels of
flatkern._C where it has any, and writes bench/results/sass/sass.md and sass.json. No GPU is needed.
`python -m bench.sass FILE...` prints the same table for cubins and shared objects.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.sass_flow import Line, count, fused_products, loops, parse, path

RESULTS = Path(__file__).parent / "results" / "sass"
ARCHS = (80, 90, 100)

_WIDTH = re.compile(r"\.[US]?(256|128|64|16|8)\b")


@dataclass(frozen=True)
class Report:
    """What one kernel costs; counts are of the hot part unless said otherwise."""

    kernel: str
    arch: int
    per_element: float | None  # None where no store is 128 bits wide
    loop: bool  # the hot part is a loop, not the whole kernel
    path: float | None  # per element: through a row norm's loop, or a kernel that has no hot loop
    loads: dict[str, int]  # by bits
    stores: dict[str, int]
    shared: int  # accesses to shared memory and shuffles
    spills: int  # of the whole kernel
    spill_bytes: int  # of stack, the whole kernel
    registers: int
    instructions: int  # of the whole kernel
    cosines: int  # of the whole kernel: where noise is made
    fused: int  # adds of unrounded noise, of the whole kernel
    products: int  # of matrices on tensor cores, of the hot part


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: Triton's package has them, so does a CUDA toolkit."""
    try:
        import triton
    except ImportError:
        found = None
    else:
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if found is not None and found.is_file():
        return str(found)
    on_path = shutil.which(name)
    if on_path is None:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on the PATH")
    return on_path


def widths(lines: list[Line], kind: str) -> dict[str, int]:
    """How many global loads (LDG) or stores (STG) there are of each width in bits."""
    found: Counter[str] = Counter()
    for line in lines:
        if line.text.startswith(kind):
            match = _WIDTH.search(line.text.split()[0])
            found[match[1] if match else "32"] += 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def wide_bytes(lines: list[Line]) -> int:
    """Bytes that the stores of at least 128 bits write, one thread once."""
    return sum(int(bits) // 8 * n for bits, n in widths(lines, "STG").items() if int(bits) >= 128)


def hot_part(lines: list[Line]) -> tuple[list[Line], bool]:
    """Of the innermost loops with wide stores the one that stores most; and True.

    A loop that stores less takes what is left over. Without any: all lines, and False.
    """
    storing = [loop for loop in loops(lines) if wide_bytes(loop)]
    places = [set(map(id, loop)) for loop in storing]
    inner = [
        loop
        for loop, own in zip(storing, places, strict=True)
        if not any(other < own for other in places)
    ]
    return (max(inner, key=wide_bytes), True) if inner else (lines, False)


def hot_path(lines: list[Line]) -> list[Line]:
    """What a warp runs of a kernel without a hot loop where no element takes longer than others.

    Of the ways that make all noise and store all vectors, that with the fewest other accesses to
    global memory: lists, raw chunks and refusals have more. Some element of a warp has bits for a
    residual's stream, so that way leads over the stream.
    """

    def rank(line: Line) -> tuple[int, int]:
        works = re.match(r"MUFU\.(COS|SIN)|FLO|STG\S*\.128", line.text)
        return bool(works), -bool(re.match(r"LDG?\.|STG?\.|ATOMG|RED\.", line.text) and not works)

    return path(lines, rank, via=lambda line: line.text.startswith("ATOMS"))


def norm_path(lines: list[Line]) -> list[Line]:
    """What a warp runs of a row norm's smallest loop that loads 128 bits (and multiplies, if any).

    Of the ways that multiply most, that with the most wide loads and the fewest others: columns
    past the last are loaded one by one.
    """
    multiplies = any(line.text.startswith("HMMA") for line in lines)
    wide = re.compile(r"LDG\S*\.128")
    found = [
        loop
        for loop in loops(lines)
        if any(wide.match(line.text) for line in loop)
        and (not multiplies or any(line.text.startswith("HMMA") for line in loop))
    ]
    if not found:
        return []

    def rank(line: Line) -> tuple[int, int, int]:
        is_wide = bool(wide.match(line.text))
        return (
            line.text.startswith("HMMA"),
            is_wide,
            -(line.text.startswith("LDG") and not is_wide),
        )

    *turn, back = min(found, key=count)
    return [*path(turn, rank, via=lambda line: False), back]


def _matching(lines: list[Line], pattern: str) -> int:
    match = re.compile(pattern).match
    return sum(match(line.text) is not None for line in lines)


def analyse(cubin: Path, element_bytes: int | None = None) -> list[Report]:
    """A report for each kernel of a cubin; the size of a stored element may come from its name."""
    text = _run("nvdisasm", "-c", "-ndf", str(cubin))
    arch = re.search(r"EF_CUDA_SM(\d+)|\.target\s+sm_(\d+)", text)
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage)
    }
    reports = []
    functions = parse(text)
    for name, (symbol, lines) in zip(demangled(functions), functions.items(), strict=True):
        hot, is_loop = hot_part(lines)
        size = element_bytes or stored_bytes(name)
        elements = wide_bytes(hot) // size
        way = hot_path(lines) if elements and not is_loop else []
        if name.startswith("row_norm_kernel<"):
            hot, is_loop = norm_path(lines), False
            way, elements = hot, _matching(hot, r"LDG\S*\.128") * 16 // size
        registers, stack = resources[symbol]
        reports.append(
            Report(
                kernel=name,
                arch=int(arch[1] or arch[2]),
                per_element=round(count(hot) / elements, 2) if elements else None,
                loop=is_loop,
                path=round(count(way) / elements, 2) if elements and way else None,
                loads=widths(hot, "LDG"),
                stores=widths(hot, "STG"),
                shared=_matching(hot, r"LDS|STS|LDSM|STSM|SHFL|ATOMS"),
                spills=_matching(lines, r"LDL|STL"),
                spill_bytes=stack,
                registers=registers,
                instructions=count(lines),
                cosines=_matching(lines, r"MUFU\.COS"),
                fused=len(fused_products(lines)),
                products=_matching(hot, "HMMA"),
            )
        )
    return reports


def _run(name: str, *arguments: str, **options: Any) -> str:
    run = subprocess.run(
        [tool(name), *arguments], check=False, capture_output=True, text=True, **options
    )
    if run.returncode != 0:
        raise SystemExit(f"bench.sass: error: {name} {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout


def demangled(symbols: Iterable[str]) -> list[str]:
    """`name<template arguments>` of C++ symbols, namespaces left out; others as they are."""
    symbols = list(symbols)
    if shutil.which("c++filt") is None:
        return symbols
    names = "\n".join(symbols)
    run = subprocess.run(["c++filt"], input=names, check=True, capture_output=True, text=True)
    found = [re.sub(r"\(.*", "", name).removeprefix("void ") for name in run.stdout.splitlines()]
    return [re.sub(r"\w+::", "", name) for name in found]


def stored_bytes(name: str) -> int:
    """Size of the elements that a kernel stores: by the last dtype in its name."""
    sizes = {"BFloat16": 2, "Float16": 2, "bf16": 2, "fp16": 2, "half": 2, "float": 4, "bits": 8}
    found = re.findall("|".join(sizes), name)
    return sizes[found[-1]] if found else 4


def analyse_file(file: Path) -> list[Report]:
    """Reports of all kernels in a cubin, or in a shared object's cubins."""
    if file.suffix == ".cubin":
        return analyse(file)
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", str(file.resolve()), cwd=folder)
        return [
            report for cubin in sorted(Path(folder).glob("*.cubin")) for report in analyse(cubin)
        ]


def table(reports: list[Report]) -> str:
    """Markdown, one row for each kernel and architecture."""

    def show(counts: dict[str, int]) -> str:
        return " ".join(f"{n}x{bits}" for bits, n in counts.items())

    rows = [
        (
            report.kernel,
            f"sm_{report.arch}",
            "" if report.per_element is None else f"{report.per_element:.2f}",
            "loop" if report.loop else "kernel",
            "" if report.path is None else f"{report.path:.2f}",
            show(report.loads),
            show(report.stores),
            report.shared,
            report.registers,
            f"{report.spills} ({report.spill_bytes} B)" if report.spills else "0",
        )
        for report in reports
    ]
    headers = (
        "kernel",
        "arch",
        "instr/elem",
        "of",
        "path",
        "loads",
        "stores",
        "shared",
        "regs",
        "spills",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Write the table of all kernels, or print that of some files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="cubins or shared objects")
    files = parser.parse_args().files
    if files:
        print(table([report for file in files for report in analyse_file(file)]))
        return
    import flatkern
    from bench import sass_triton

    reports = sass_triton.reports((name, arch) for name in sass_triton.cases() for arch in ARCHS)
    versions = sass_triton.versions()
    extension = getattr(flatkern._backend._C, "__file__", None)
    if extension:
        cuda = analyse_file(Path(extension))
        reports += sorted(cuda, key=lambda report: (report.kernel, report.arch))
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "python": platform.python_version(), **versions}
    data = {"about": about, "kernels": [asdict(report) for report in reports]}
    (RESULTS / "sass.json").write_text(json.dumps(data, indent=1) + "\n")
    heading = ", ".join(f"{name} {version}" for name, version in about.items())
    text = f"""# Instructions per element

Made by `python -m bench.sass` without a GPU: {heading}.

Static instructions of the innermost SASS loop that holds most stores of 128 bits or more (of the
whole kernel, where none does), over the elements that those store. Loads, stores (count x bits)
and accesses to shared memory are of the same part, registers and spills of the whole kernel. Path,
where no loop does: the instructions on the way that makes all noise, stores all vectors and
otherwise touches global memory least, which most warps take. Of the CUDA `row_norm_kernel`, which
stores next to nothing, all but registers and spills is of the way through the loop that loads W in
128 bits, over the elements that it loads.

{table(reports)}
"""
    (RESULTS / "sass.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
