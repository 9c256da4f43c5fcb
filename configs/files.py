"""Files as everything here writes and checks them: strict JSON, replaced whole, known by their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["file_sha256", "naming", "to_json", "write_atomically"]


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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
