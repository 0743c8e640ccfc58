"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_files(folder: Path, writes: dict[str, Callable[[Path], Any]]) -> None:
    """Write files of these names, all of them or none: on an error the old ones stand.

    Args:
        folder: exists.
        writes: what writes a file, at a path beside the one that it is then moved to.

    Raises:
        OSError: they cannot be written.
    """
    parts = {name: folder / f"{name}.{os.getpid()}.part" for name in writes}
    try:
        for name, write in writes.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
