"""The file of a study: a line of conditions, then a line for each cell that is done."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flatkern.study import StudyError

CELLS = "cells.jsonl"


class Store:
    """What is done, in `folder`/cells.jsonl; only appended to, so that a stop loses one line.

    Attributes:
        rows: the cells by key.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        """Read what is there.

        Raises:
            StudyError: the folder cannot be written, or holds a study of other conditions.
        """
        self.path = folder / CELLS
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise StudyError(f"--out: {folder} cannot be written: {error}") from error
        lines = self.path.read_text().splitlines(keepends=True)
        # The last line of a run that was killed may be half a line.
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            os.truncate(self.path, sum(len(line.encode()) for line in whole))
        if not whole:
            self._write([conditions])
            return
        try:
            found, *rows = map(json.loads, whole)
            self.rows = {row["key"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{self.path} is no file of a study ({error}): choose another --out"
            ) from error
        if found != json.loads(json.dumps(conditions)):
            raise StudyError(
                f"{self.path} is of a study with other conditions ({found}): choose another --out "
                f"than {folder}"
            )

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Cells that are done."""
        rows = list(rows)
        self._write(rows)
        self.rows.update({row["key"]: row for row in rows})

    def _write(self, values: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())
