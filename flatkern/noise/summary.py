"""What `WeightNoise.summary` prints."""

from collections.abc import Iterable

from flatkern.noise.state import State


def summarise(
    states: list[State], mode: str, silent: Iterable[str], skipped: dict[str, str]
) -> str:
    """A line for each weight, then the totals.

    Args:
        states: of the weights of one `WeightNoise`.
        mode: of the `WeightNoise`.
        silent: the names of those that no window has reached.
        skipped: why a parameter in scope takes no noise, by its name.
    """
    rows = []
    elements = operand_bytes = kept_bytes = 0
    silent, first = set(silent), {}
    for state in states:
        target = state.target
        shape, quantized = target.shape, target.quantized
        dtype = str(target.weight.dtype).removeprefix("torch.")
        stored = dtype if quantized is None else quantized.format
        number = f"tensor {target.number}"
        own_mode = mode if target.layers else "inplace"
        own_mode += " (never called: no noise)" if target.name in silent else ""
        # Layers that share a weight have a scale each, and one line.
        if first.setdefault(target.name, target) is target:
            rows.append((target.name, stored, str(list(shape)), number, own_mode))
            elements += shape.numel()
        # float32 for every row and one key of four int64.
        operand_bytes += 4 * target.rows.count(shape) + 32
        kept_bytes += state.keeper.nbytes() if state.keeper is not None else 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = f"{len(rows)} weights, {elements:,} elements; {operand_bytes:,} bytes of row scales "
    total += "and keys"
    if not all(state.target.is_virtual(mode) for state in states):
        total += f", {kept_bytes:,} bytes of clean bits"
    if skipped:
        total += "; no noise on " + ", ".join(f"{name} ({why})" for name, why in skipped.items())
    return "\n".join([*lines, total])
