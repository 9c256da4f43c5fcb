"""Decoded images and their statistics, kept on the disk between runs, once for all processes of a machine."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from ...configs.errors import InputError, readable, shown
from ...configs.files import write_atomically
from .base import Images, Measures
from .files import ImageFiles


class Cache:
    """A folder of what has been read from images; if the images or their files change, they are read again.

    Args:
        folder: made when something is kept; None is seqjepa in $XDG_CACHE_HOME, or else in ~/.cache.
    """

    def __init__(self, folder: str | None):
        self.given = folder

    @functools.cached_property
    def folder(self) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        try:
            return Path(self.given or f"{base}/seqjepa").expanduser()
        except RuntimeError:  # this user has no home
            raise InputError(
                "there is no home to keep images in; data.cache=FOLDER names a place", "data.cache"
            ) from None

    def measure(self, images: Images) -> str | None:
        """Fill in fingerprint and statistics as they were the last time; if there was none, all images are read.

        Returns:
            None, or a line that says why they could not be kept.

        Raises:
            InputError: an image cannot be read.
        """
        name = _name(images)
        known = self._known(name, None)
        if known is not None:
            images.measures = known
            return None
        try:
            with self._alone(name):
                images.measures = self._known(name, None)  # another process may have measured them meanwhile
                if images.measures is None:
                    self._remember(name, _read(images), None)
        except InputError as error:
            if error.field != "data.cache":
                raise
            images.measured()
            return str(error)
        return None

    def map(self, images: Images) -> Path:
        """Replace the pixels by a memory-mapped file of them; it is written if there is none.

        Returns:
            The file, in NumPy's format: uint8 [N, H, W, C].

        Raises:
            InputError: an image cannot be read, or the folder not be written.
        """
        name = _name(images)
        path = self.folder / f"{name}.npy"
        known = self._known(name, path)
        if known is None:
            with self._alone(name):
                known = self._known(name, path)  # another process may have written it meanwhile
                if known is None:
                    self._write(path, images)
                    known = images.measured()
                    self._remember(name, known, path)
        images.measures = known
        with readable(path, "data.cache"):
            images.pixels = np.load(path, mmap_mode="r")
        return path

    def room(self) -> int:
        """Bytes that are free where it is, or will be; 0 if that cannot be found out."""
        try:
            place = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
            return shutil.disk_usage(place).free
        except (InputError, OSError, StopIteration):
            return 0

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep other processes from what is kept under a name; the system's errors become one line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{name}.lock"):
                yield
        except OSError as error:
            said = "data.cache names another place, and data.loader=files or resident needs none"
            problem = f"{shown(error.filename or self.folder)}: cannot keep images there ({error.strerror}); {said}"
            raise InputError(problem, "data.cache") from None

    def _known(self, name: str, path: Path | None) -> Measures | None:
        """What was measured, if the file of pixels, where one is asked for, is still the one that was written."""
        try:
            kept = json.loads((self.folder / f"{name}.json").read_text())
            if path is not None and kept["file"] != _facts(path):
                return None
            return Measures(kept["fingerprint"], np.asarray(kept["counts"], np.int64))
        except (OSError, ValueError, KeyError, TypeError):  # it is not there, or not whole
            return None

    def _remember(self, name: str, measures: Measures, path: Path | None) -> None:
        facts = None if path is None else _facts(path)
        kept = {"fingerprint": measures.fingerprint, "counts": measures.counts.tolist(), "file": facts}
        write_atomically(self.folder / f"{name}.json", json.dumps(kept))

    def _write(self, path: Path, images: Images) -> None:
        shape, partial = images.pixels.shape, path.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # of a process that was killed
        size, free = math.prod(shape), shutil.disk_usage(self.folder).free
        if size > free:
            needed = f"{size >> 20} MiB are needed, {free >> 20} are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed}", str(path))
        try:
            with partial.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
                np.lib.format.write_array_header_1_0(file, header)
                for part in _all_parts(images):
                    file.write(np.ascontiguousarray(part).data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            partial.unlink(missing_ok=True)


def _facts(path: Path) -> list[int]:
    """Size and time of change of a file, which tell whether another program has written to it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _all_parts(images: Images) -> Iterator[np.ndarray]:
    """As `images.parts`, decoded by all cores: the other processes of the machine wait meanwhile."""
    files = images.pixels if isinstance(images.pixels, ImageFiles) else None
    if files is None:
        yield from images.parts()
        return
    threads, files.threads = files.threads, None
    try:
        yield from images.parts()
    finally:
        files.threads = threads


def _read(images: Images) -> Measures:
    for _ in _all_parts(images):
        pass
    return images.measured()


def _name(images: Images) -> str:
    """A name for the images as they are now: of files, by their paths, sizes and times, and how they are decoded."""
    if not isinstance(images.pixels, ImageFiles):
        return images.measured().fingerprint[:32]
    digest = hashlib.sha256(repr(images.pixels.recipe()).encode())
    for path in images.pixels.paths:
        with readable(path, "data.root"):
            digest.update(repr((os.path.realpath(path), *_facts(Path(path)))).encode(errors="surrogateescape"))
    digest.update(np.ascontiguousarray(images.labels, dtype="<i8").data)
    return digest.hexdigest()[:32]
