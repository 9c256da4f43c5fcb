"""The manifest of a checkpoint: size and SHA-256 of each of its files, by which damage is found."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ...configs.errors import InputError
from ...configs.files import file_sha256, to_json, write_atomically

MANIFEST = "manifest.json"
NAMES = re.compile(r"(model|probes|trainer|rng-\d{5})\.safetensors|state\.json")
NEEDED = ("model.safetensors", "probes.safetensors", "trainer.safetensors", "rng-00000.safetensors", "state.json")


class Damaged(InputError):
    """A file of a checkpoint is missing, cut short or changed."""


@contextlib.contextmanager
def reading(path: Path, form: str = "readable") -> Iterator[None]:
    """Turn what fails while a file or folder of a checkpoint is read into an error of its own.

    Args:
        path: path of the file or folder.
        form: name of the format that the content does not have.

    Raises:
        Damaged: it is missing, not in this form, or lost by the disk.
        InputError: it cannot be read for a reason that is not damage, such as permissions.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise Damaged(f"{path}: missing", "run.resume") from None
        if error.errno == errno.EIO:  # the disk has lost it
            raise Damaged(f"{path}: cannot be read ({error.strerror})", "run.resume") from None
        advice = "it may be undamaged: let this user read it, or name another checkpoint in run.resume"
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}", "run.resume") from None
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise Damaged(f"{path}: not {form} ({type(error).__name__})", "run.resume") from None


def regular_file(path: Path) -> os.stat_result:
    """Status of a file of a checkpoint.

    Raises:
        Damaged: it is missing, or something else than a file, such as a pipe, which would never end.
        InputError: its folder cannot be entered.
    """
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path}: missing; what has this name is no file", "run.resume")
    return status


def seal(folder: Path) -> None:
    """Write the manifest of all files in a folder, and flush everything to the disk."""
    entries = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    write_atomically(folder / MANIFEST, to_json(entries, indent=1) + "\n")
    for path in [*folder.iterdir(), folder]:
        to_disk(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    if os.name == "nt":  # which opens no folders, and flushes no file that is only read
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def verify(folder: Path) -> None:
    """Compare each file of a checkpoint with its manifest.

    Raises:
        Damaged: names the first file that is missing, of another size, or changed.
        InputError: names the first file that cannot be read.
    """
    manifest = folder / MANIFEST
    regular_file(manifest)
    with reading(manifest, "a manifest"):
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    for needed in NEEDED:
        if needed not in expected:
            raise Damaged(f"{manifest}: does not list {needed}", "run.resume")
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not NAMES.fullmatch(name):  # a manifest must not lead to files elsewhere
            raise Damaged(f"{manifest}: lists {name!r}, which does not belong to a checkpoint", "run.resume")
        if (found := regular_file(path).st_size) != size:
            raise Damaged(f"{path}: {found} bytes, the manifest says {size}", "run.resume")
        with reading(path):
            unchanged = file_sha256(path) == sha256
        if not unchanged:
            raise Damaged(f"{path}: changed, its checksum is not the manifest's", "run.resume")
