"""Records of a run: strict JSON, files replaced whole, and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["MetricsFile", "naming", "read_rows", "to_json", "write_atomically"]


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and the infinities become null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(value), indent=indent, allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by its new text, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # there only if something failed; on a read-only disk it cannot go
            partial.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk, within it, knows the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The epochs of a metrics.jsonl, each a mapping of names to numbers; none if there is no file.

    A line that is no such record is left out: a crash may have cut the last, time may have damaged another.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _numbers(row) and type(row.get("epoch")) is int and _numbers(row.get("timing", {})):
                rows.append(row)
    return rows


def _numbers(record: Any) -> bool:
    """Whether a record holds numbers alone, `timing` apart."""
    if not isinstance(record, dict):
        return False
    return all(value is None or type(value) in (int, float) for name, value in record.items() if name != "timing")


class MetricsFile:
    """metrics.jsonl: a line an epoch.

    Args:
        path: of the file.
        epochs: lines of later epochs, left by a run that is resumed from before them, are dropped.

    Attributes:
        lost: epochs up to that one whose lines are missing or damaged.
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
