"""Folders of image files, with a folder for each class, or without classes."""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np

from ...configs.errors import InputError, readable, shown
from .base import Dataset, Images
from .files import identity

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
# where storage systems and archives keep copies, thumbnails and deleted files; other such names begin with a dot
KEPT_ASIDE = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
KEPT_ASIDE |= {"__macosx"}


class ImageFolder(Dataset):
    """Any images. Every dataset can be read from train/ and test/; this one has no other files.

    Without test/ or val/, some of the images of train/, or of the folder itself, are held out.
    """

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        exists = root is not None and root.is_dir()
        raise InputError(f"{root}: {'has test images and no train/' if exists else 'no such folder'}", "data.root")


def list_images(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Find the images of a split, in the order of torchvision's ImageFolder.

    A folder that has images and no folders is a set without classes. Hidden files and folders, files without an image's
    extension, files outside of a class's folder and links to a folder that was already read are passed over. A line on
    stderr counts them, and the images that links repeat.

    Args:
        folder: the split's, with a folder for each class, or with images.

    Returns:
        Names of the classes, path of each image, class of each image (int64 [N]; zeros without classes).

    Raises:
        InputError: there are neither classes nor images, a class has no image, a folder or an image belongs to two
            classes, a folder cannot be read, or an entry is neither a file nor a folder.
    """
    walk = _Walk(folder)
    classes, outside = walk.read(str(folder), None)
    if not classes and outside:
        walk.report(folder, len(outside))
        return [], outside, np.zeros(len(outside), np.int64)
    walk.others += outside
    if not classes:
        raise InputError(f"{folder}: holds neither folders of classes nor images", "data.root")
    paths, labels = [], []
    for label, top in enumerate(classes):
        images, folders = {}, [top]
        while folders:
            where = folders.pop()
            inner, images[where] = walk.read(where, top)
            folders += inner
        inside = [path for where in sorted(images) for path in images[where]]
        if not inside:
            raise InputError(f"{shown(top)}: holds no image; {', '.join(EXTENSIONS)} are read", "data.root")
        paths += inside
        labels += [label] * len(inside)
    walk.report(folder, len(paths))
    return [os.path.basename(top) for top in classes], paths, np.asarray(labels, np.int64)


class _Walk:
    """Lists folders, and records what it met, so that nothing is read twice and everything skipped is reported."""

    def __init__(self, folder: Path):
        self.others: list[str] = []
        # device and inode of each, and its path and class when it was first met
        self.images: dict[tuple[int, int], tuple[str, str | None]] = {}
        self.folders: dict[tuple[int, int], tuple[str, str | None]] = {}
        for above in folder.resolve().parents:
            with contextlib.suppress(OSError):
                self.folders[identity(os.stat(above))] = str(above), None

    def read(self, folder: str, top: str | None) -> tuple[list[str], list[str]]:
        """Sorted paths of the folders and of the images in a folder that belongs to the class `top`."""
        folders, images = [], []
        with readable(folder, "data.root"):
            here = identity(os.stat(folder))
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
                        image = identity(entry.stat()) if entry.is_symlink() else (here[0], entry.inode())
                        self._first(self.images.setdefault(image, (entry.path, top)), entry.path, top, "image")
                    else:
                        self.others.append(entry.path)
        return folders, images

    @staticmethod
    def _first(seen: tuple[str, str | None], path: str, top: str | None, kind: str) -> str:
        """Where something was met first; refuses it if that was in another class, because it would have two labels."""
        first, other = seen
        if other not in (None, top):
            raise InputError(f"{shown(path)} and {shown(first)}: one {kind} in two classes, by a link", "data.root")
        return first

    def _pass_over(self, entry: os.DirEntry[str]) -> None:
        inside = []
        if entry.is_dir(follow_symlinks=False):
            inside = [os.path.join(where, name) for where, _, names in os.walk(entry.path) for name in names]
        self.others += sorted(inside) or [entry.path]

    def report(self, folder: Path, taken: int) -> None:
        """Print to stderr what was skipped, and how many images are repeated."""
        facts = [f"{folder}: {taken} images"]
        if links := taken - len(self.images):
            facts.append(f"{links} of them repeat another by a link")
        if self.others:
            some = ", ".join(map(shown, self.others[:3])) + (", ..." if len(self.others) > 3 else "")
            facts.append(f"{len(self.others)} other file(s) passed over: {some}")
        if len(facts) > 1:
            print("; ".join(facts), file=sys.stderr)
