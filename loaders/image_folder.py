"""A folder with a folder of images for each class: which images there are, and their pixels when they are asked for."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..configs.errors import InputError, readable, shown

__all__ = ["EXTENSIONS", "ImageFiles", "list_images"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")  # others could start programs, as PostScript does
TOO_LARGE = "images of up to 89 million pixels are read"  # Pillow's bound, against files that unpack to gigabytes
# folders of copies, thumbnails and what was deleted, which storage and archives keep; others begin with a dot
KEPT_ASIDE = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
KEPT_ASIDE |= {"__macosx"}


def list_images(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Find the images of a split, in the order of torchvision's ImageFolder.

    Hidden files and folders, files that do not bear an image's name in a class's folder, and links to a folder that has
    been seen are passed over; a line on stderr counts them, and the images that links repeat.

    Args:
        folder: of the split, with a folder for each class.

    Returns:
        Names of the classes, path of each image, class of each image (int64).

    Raises:
        InputError: there is no class, a class without images, a folder or an image of two classes at once, a folder
            that cannot be read, or something that is neither a file nor a folder.
    """
    walk = _Walk(folder)
    classes, outside = walk.look_into(str(folder), None)
    walk.others += outside
    if not classes:
        raise InputError(f"{folder}: holds no folder of a class", "data.root")
    paths, labels = [], []
    for label, top in enumerate(classes):
        images, folders = {}, [top]
        while folders:
            where = folders.pop()
            inner, images[where] = walk.look_into(where, top)
            folders += inner
        inside = [path for where in sorted(images) for path in images[where]]
        if not inside:
            raise InputError(f"{shown(top)}: holds no image; {', '.join(EXTENSIONS)} are read", "data.root")
        paths += inside
        labels += [label] * len(inside)
    walk.tell(folder, len(paths))
    return [os.path.basename(top) for top in classes], paths, np.asarray(labels, np.int64)


class _Walk:
    """What has been come upon, so that nothing is read twice, and nothing left out in silence."""

    def __init__(self, folder: Path):
        self.others: list[str] = []
        # path and class of each, by device and inode
        self.images: dict[tuple[int, int], tuple[str, str | None]] = {}
        self.folders: dict[tuple[int, int], tuple[str, str | None]] = {}
        for above in folder.resolve().parents:
            with contextlib.suppress(OSError):
                self.folders[_identity(os.stat(above))] = str(above), None

    def look_into(self, folder: str, top: str | None) -> tuple[list[str], list[str]]:
        """Paths of the folders and of the images in a folder of the class `top`, sorted; the rest is noted."""
        folders, images = [], []
        with readable(folder, "data.root"):
            here = _identity(os.stat(folder))
            if here in self.folders:
                self.others.append(f"{folder} (again {self._first(self.folders[here], folder, top, 'folder')})")
                return [], []
            self.folders[here] = folder, top
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith(".") or entry.name.lower() in KEPT_ASIDE:
                        self._pass_over(entry)
                    elif entry.is_dir():
                        folders.append(entry.path)
                    elif not entry.is_file():
                        nothing = f"{shown(entry.path)}: neither a file nor a folder, or a link that leads nowhere"
                        raise InputError(nothing, "data.root")
                    elif entry.name.lower().endswith(EXTENSIONS):
                        images.append(entry.path)
                        image = _identity(entry.stat()) if entry.is_symlink() else (here[0], entry.inode())
                        self._first(self.images.setdefault(image, (entry.path, top)), entry.path, top, "image")
                    else:
                        self.others.append(entry.path)
        return folders, images

    @staticmethod
    def _first(seen: tuple[str, str | None], path: str, top: str | None, kind: str) -> str:
        """Where something was come upon before; what two classes hold has no label."""
        first, other = seen
        if other not in (None, top):
            raise InputError(f"{shown(path)} and {shown(first)}: one {kind} in two classes, by a link", "data.root")
        return first

    def _pass_over(self, entry: os.DirEntry[str]) -> None:
        inside = []
        if entry.is_dir(follow_symlinks=False):
            inside = [os.path.join(where, name) for where, _, names in os.walk(entry.path) for name in names]
        self.others += sorted(inside) or [entry.path]

    def tell(self, folder: Path, taken: int) -> None:
        """Say what was passed over, and which images are there more than once."""
        facts = [f"{folder}: {taken} images"]
        if links := taken - len(self.images):
            facts.append(f"{links} of them repeat another by a link")
        if self.others:
            some = ", ".join(map(shown, self.others[:3])) + (", ..." if len(self.others) > 3 else "")
            facts.append(f"{len(self.others)} other files passed over: {some}")
        if len(facts) > 1:
            print("; ".join(facts), file=sys.stderr)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class ImageFiles:
    """Image files of one size, which are decoded when a slice of them is asked for, as if they were an array.

    Args:
        paths: of the files.

    Attributes:
        shape: [N, H, W, 3].
        nbytes: that the pixels would fill.

    Raises:
        InputError: a file is no image of 8 bits a channel, or not of the size of the first.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        with _bombs_ignored():
            try:
                height, width, _ = _decode(paths[0]).shape
            except MemoryError:  # a header needs none; who reads the pixels says how many they are
                with _opened(paths[0]) as image:
                    width, height = image.size
        self.shape = (len(paths), height, width, 3)
        self.nbytes = math.prod(self.shape)

    def identities(self) -> list[tuple[int, int]]:
        """Device and inode of each file: equal for links to one file."""
        return [_identity(os.stat(path)) for path in self.paths]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Pixels of some of the images, uint8 [n, H, W, 3]."""
        paths = self.paths[part]
        pixels = np.empty((len(paths), *self.shape[1:]), np.uint8)

        def place(position: int) -> None:
            image = _decode(paths[position])
            if image.shape != pixels.shape[1:]:
                given, expected = (f"{width}x{height}" for height, width, _ in (image.shape, pixels.shape[1:]))
                path = shown(paths[position])
                raise InputError(
                    f"{path}: {given} pixels, the others have {expected}; resize them to one size", "data.root"
                )
            pixels[position] = image

        pool = ThreadPoolExecutor()
        try:
            with _bombs_ignored():
                for _ in pool.map(place, range(len(paths))):
                    pass
        finally:  # an interrupt waits for the images in hand, not for all
            pool.shutdown(cancel_futures=True)
        return pixels


def _bombs_ignored() -> warnings.catch_warnings:
    """Pillow's warning of large images: `_opened` has an error of one line for them."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def _decode(path: str) -> np.ndarray:
    """Pixels of an image file, uint8 [H, W, 3]."""
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image file whose header has been read; within it, what its decoder says is told in one line."""
    try:
        with readable(path, "data.root"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise InputError(f"{shown(path)}: {image.width}x{image.height} pixels; {TOO_LARGE}", "data.root")
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise InputError(f"{shown(path)}: {image.mode} pixels; 8 bits a channel are allowed", "data.root")
            yield image
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{shown(path)}: {TOO_LARGE}", "data.root") from None
    except Exception as error:  # Pillow's plugins raise whatever they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "out of memory" in reason:  # of a decoder
            raise MemoryError from None
        raise InputError(f"{shown(path)}: not a readable image ({reason})", "data.root") from None


def _is_deep(image: Any) -> bool:
    """Whether an image in a mode of 8 bits a channel has 16, which Pillow would cut."""
    for codec, _, _, args in image.tile:
        mode, *rest = args if isinstance(args, tuple) else (args,)
        if ";16" in str(mode) or (codec == "ppm" and rest and rest[0] > 255):  # there, the largest value
            return True
    return False
