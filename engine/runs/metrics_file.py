"""metrics.jsonl and steps.jsonl: a line of JSON for each epoch of a run, and for each step that is logged."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from ...configs.files import naming, to_json, write_atomically


def read_rows(path: Path, key: Literal["epoch", "step"] = "epoch") -> list[dict[str, Any]]:
    """The epochs of a metrics.jsonl, or the steps of a steps.jsonl, each a mapping of names to numbers.

    There are none if there is no file. Other lines are left out: a crash may have cut the last one short, and any may
    have been damaged since.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _numbers(row) and type(row.get(key)) is int and _numbers(row.get("timing", {})):
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
        _append(self.path, row, at_once=True)


class StepsFile:
    """Writes steps.jsonl. Its last lines may be lost if the machine fails; nothing else depends on them.

    Args:
        path: path of the file.
        steps: number of steps so far; lines of later ones, which a resumed run repeats, are dropped.
    """

    def __init__(self, path: Path, steps: int):
        self.path = path
        kept = [row for row in read_rows(path, "step") if row["step"] <= steps]
        write_atomically(path, "".join(to_json(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        _append(self.path, row, at_once=False)


def _append(path: Path, row: dict[str, Any], *, at_once: bool) -> None:
    """Add a line; it is on the disk `at_once`, or when the system finds time."""
    with naming(path), path.open("a") as file:
        file.write(to_json(row) + "\n")
        file.flush()
        if at_once:
            os.fsync(file.fileno())
