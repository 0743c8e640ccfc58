"""What nvdisasm prints, and the ways through it."""

import functools
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_FUNCTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
_SECTION = re.compile(r"\s*\.section\s")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;")
_TARGET = re.compile(r"BRA\b.*`\((\.L_\w+)\)")
# Without an operand beside its target.
_ALWAYS = re.compile(r"BRA(\.U)?\s+`\(")
_END = re.compile(r"EXIT\b|RET\b")
_NOISE = re.compile(r"MUFU\.(COS|SIN)")
_FUSED = re.compile(r"FFMA|HFMA2|FMA")
_REGISTER = re.compile(r"\bR(\d+)")


@dataclass(frozen=True)
class Line:
    """One line of SASS: a label or an instruction without its predicate."""

    label: str | None
    text: str
    guarded: bool = False  # by a predicate


def parse(text: str) -> dict[str, list[Line]]:
    """Lines of each function in nvdisasm's output."""
    functions: dict[str, list[Line]] = {}
    lines: list[Line] | None = None
    for row in text.splitlines():
        # Instructions first: they are most of a million rows.
        if lines is not None and (match := _INSTRUCTION.match(row)):
            lines.append(Line(None, match[2], match[1] is not None))
        elif match := _FUNCTION.match(row):
            lines = functions.setdefault(match[1], [])
        elif _SECTION.match(row):
            lines = None
        elif lines is not None and (match := _LABEL.match(row)):
            lines.append(Line(match[1], ""))
    return functions


def count(lines: list[Line]) -> int:
    """Instructions, without the padding behind the end."""
    return sum(line.label is None and not line.text.startswith("NOP") for line in lines)


def loops(lines: list[Line]) -> list[list[Line]]:
    """The lines between each label and a branch back to it."""
    places = {line.label: i for i, line in enumerate(lines) if line.label}
    found = []
    for i, line in enumerate(lines):
        match = _TARGET.match(line.text)
        # The branch to itself that ends every function is no loop.
        if match and places.get(match[1], i) < i - 1:
            found.append(lines[places[match[1]] : i + 1])
    return found


def successors(lines: list[Line]) -> list[list[int]]:
    """Where each line may lead; the line behind the last is the end, and has an entry too.

    A call leads behind itself: what it runs is not followed.
    """
    places = {line.label: i for i, line in enumerate(lines) if line.label}
    found = []
    for i, line in enumerate(lines):
        to = []
        if match := _TARGET.match(line.text):
            to.append(places[match[1]])
        elif _END.match(line.text):
            to.append(len(lines))
        if not to or line.guarded or (match and not _ALWAYS.match(line.text)):
            to.append(i + 1)
        found.append(to)
    return [*found, []]


def _forward(edges: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
    """Each line that the first leads to, behind those it leads to; edges that close loops left out.

    A search in depth, without recursion.
    """
    open_, closed = {0}, set()
    stack = [(0, iter(edges[0]))]
    while stack:
        line, left = stack[-1]
        for to in left:
            if to not in open_ and to not in closed:
                open_.add(to)
                stack.append((to, iter(edges[to])))
                break
        else:
            stack.pop()
            open_.remove(line)
            closed.add(line)
            yield line, [to for to in edges[line] if to in closed]


def path(
    lines: list[Line], rank: Callable[[Line], tuple[int, ...]], via: Callable[[Line], bool]
) -> list[Line]:
    """The way through a function whose ranks add up to the most; of those the shortest.

    It leads over one line at least that `via` is true of, if there is any. Loops are gone through
    once at most.
    """
    edges, end = successors(lines), len(lines)
    # From a line to the end, over a `via` still (True) or not: the ranks' sum and minus the
    # instructions; the next line.
    best: dict[tuple[int, bool], tuple[int, ...]] = {(end, False): (0,) * (len(rank(lines[0])) + 1)}
    then: dict[tuple[int, bool], tuple[int, bool]] = {}
    for at, to in _forward(edges):
        if at == end:
            continue
        line = lines[at]
        own = (*rank(line), -(line.label is None))
        for needs in (False, True):
            left = needs and not via(line)
            ways = [(next_line, left) for next_line in to if (next_line, left) in best]
            if ways:
                then[at, needs] = way = max(ways, key=best.__getitem__)
                best[at, needs] = tuple(map(sum, zip(own, best[way], strict=True)))
    place = 0, any(map(via, lines))
    found = []
    while place[0] < end:
        found.append(lines[place[0]])
        place = then[place]
    return found


def fused_products(lines: list[Line]) -> list[str]:
    """Instructions that add to c cos or c sin without rounding it first.

    Follows what MUFU.COS and MUFU.SIN give through registers and products, along all ways, to a
    fused multiply-add that multiplies it.
    """
    if not any(_NOISE.match(line.text) for line in lines):
        return []
    edges = successors(lines)
    lines = [*lines, Line("end", "")]
    before: list[set[str] | None] = [None] * len(lines)
    before[0] = set()
    found: dict[int, str] = {}
    queue = deque([0])
    while queue:
        at = queue.popleft()
        after = set(before[at])
        line = lines[at]
        operation = line.text.split()[0] if line.text else ""
        is_noise = _NOISE.match(operation)
        # Most lines come before there is any.
        if after or is_noise:
            targets, factors = _registers(line.text)
            carries = bool(factors & after)
            if _FUSED.match(operation) and carries:
                found[at] = line.text
            if is_noise or (carries and re.match("FMUL|MOV", operation)):
                after |= targets
            elif not line.guarded:
                after -= targets
        for to in edges[at]:
            if before[to] is None or not after <= before[to]:
                before[to] = after | (before[to] or set())
                queue.append(to)
    return [found[at] for at in sorted(found)]


@functools.cache
def _registers(text: str) -> tuple[set[str], set[str]]:
    """Registers that an instruction writes; those that it multiplies, or reads at all."""
    operation, _, operands = text.partition(" ")
    parts = [part.strip() for part in operands.split(",")]

    def named(part: str, count: int) -> set[str]:
        first = [int(number) for number in _REGISTER.findall(part)]
        return {f"R{number + i}" for number in first for i in range(count)}

    # Registers that are adjacent go by the first one's name.
    two_lanes = re.match(r"F(MUL|ADD|FMA)2", operation)
    wide = re.search(r"\.128|HMMA|LDSM", operation)
    pair = two_lanes or re.search(r"\.64|\.WIDE|CS2R|^D(ADD|FMA|MUL)", operation)
    stores = re.match(r"ST|RED\.", operation)
    targets = set() if stores else named(parts[0], 4 if wide else 2 if pair else 1)
    is_fused = _FUSED.match(operation)
    factors = parts[1:3] if is_fused else parts[1:]
    # Times zero: nothing is rounded.
    if is_fused and any(factor.startswith("RZ") for factor in factors):
        return targets, set()
    return targets, set().union(*(named(part, 2 if "F32x2" in part else 1) for part in factors))
