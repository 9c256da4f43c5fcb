"""The manifest of a checkpoint: size and SHA-256 of each of its files, so that damage is found in time."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

from seqjepa.engine.records import naming, to_json
from seqjepa.loaders import InputError
from seqjepa.loaders.beton import file_sha256

__all__ = ["MANIFEST", "Damaged", "seal", "verify"]

MANIFEST = "manifest.json"
NAMES = re.compile(r"(model|probes|trainer|rng-\d{5})\.safetensors|state\.json")

NEEDED = ("model.safetensors", "probes.safetensors", "trainer.safetensors", "rng-00000.safetensors", "state.json")


class Damaged(InputError):
    """A file of a checkpoint is missing, cut short or changed."""


def seal(folder: Path) -> None:
    """Write the manifest of all files in a folder, and bring everything to the disk."""
    entries = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    with naming(folder / MANIFEST):
        (folder / MANIFEST).write_text(to_json(entries, indent=1) + "\n")
    for path in [*folder.iterdir(), folder]:
        to_disk(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def verify(folder: Path) -> None:
    """Compare each file of a checkpoint with its manifest.

    Raises:
        Damaged: names the first file that is missing, of another size, or changed.
    """
    try:
        if not (folder / MANIFEST).is_file():  # a pipe would never end
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        entries = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise Damaged(f"{folder / MANIFEST}: not a readable manifest ({_reason(error)})", "run.resume") from None
    for needed in NEEDED:
        if needed not in expected:
            raise Damaged(f"{folder / MANIFEST}: does not list {needed}", "run.resume")
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not NAMES.fullmatch(name):  # a manifest leads nowhere else
            raise Damaged(f"{folder / MANIFEST}: lists {name!r}, which is no file of a checkpoint", "run.resume")
        if not path.is_file():
            raise Damaged(f"{path}: missing", "run.resume")
        if path.stat().st_size != size:
            raise Damaged(f"{path}: {path.stat().st_size} bytes, the manifest says {size}", "run.resume")
        try:
            found = file_sha256(path)
        except OSError as error:
            raise Damaged(f"{path}: cannot be read ({error.strerror})", "run.resume") from None
        if found != sha256:
            raise Damaged(f"{path}: changed, its checksum is not the manifest's", "run.resume")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
