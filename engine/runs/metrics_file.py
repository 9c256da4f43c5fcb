"""metrics.jsonl: one line of JSON for each epoch of a run."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ...configs.files import naming, to_json, write_atomically


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The epochs of a metrics.jsonl, each a mapping of names to numbers; none if there is no file.

    Other lines are left out: a crash may have cut the last one short, and any may have been damaged since.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _numbers(row) and type(row.get("epoch")) is int and _numbers(row.get("timing", {})):
                rows.append(row)
    return rows


def _numbers(record: Any) -> bool:
    """Whether a record is a mapping that holds only numbers, apart from `timing`."""
    if not isinstance(record, dict):
        return False
    return all(value is None or type(value) in (int, float) for name, value in record.items() if name != "timing")


class MetricsFile:
    """Writes metrics.jsonl.

    Args:
        path: path of the file.
        epochs: number of complete ones; lines of later epochs, which a resumed run repeats, are dropped.

    Attributes:
        rows: rows of the epochs, as in the file.
        lost: complete epochs whose lines are missing or damaged.
    """

    def __init__(self, path: Path, epochs: int):
        self.path = path
        known = {row["epoch"]: row for row in read_rows(path)}
        self.rows = [known[epoch] for epoch in range(1, epochs + 1) if epoch in known]
        self.lost = [epoch for epoch in range(1, epochs + 1) if epoch not in known]
        write_atomically(path, "".join(to_json(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with naming(self.path), self.path.open("a") as file:
            file.write(to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
