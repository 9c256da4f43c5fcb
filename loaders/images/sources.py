"""Where the images of a dataset are: betons, class folders, or the dataset's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...configs.errors import InputError, shown
from .base import SPLITS, Dataset, Images
from .beton import BetonImages
from .files import ImageFiles
from .folder import list_images


class Layout(NamedTuple):
    """What `data.root` contains."""

    root: Path | None
    betons: Path | None = None  # folder of train.beton and test.beton
    class_folders: bool = False  # whether train/ and test/ are there


def find_layout(dataset: Dataset, root: str | None) -> Layout:
    """Find out what `root` contains.

    Raises:
        InputError: `root` cannot be read, is a beton that is no split, or is None although the dataset needs a folder.
    """
    if root is None:
        if dataset.needs_root:
            raise InputError(f"{dataset.name} needs a folder; none was given", "data.root")
        return Layout(None)
    path = Path(root).expanduser()
    try:
        if path.suffix == ".beton":
            if not path.is_file():
                raise InputError(f"{root}: no such file", "data.root")
            if path.stem not in SPLITS:
                raise InputError(f"{root}: betons are read as a pair, train.beton and test.beton", "data.root")
            path = path.parent
        if any((path / f"{split}.beton").exists() for split in SPLITS):
            return Layout(path, betons=path)
        return Layout(path, class_folders=all((path / split).is_dir() for split in SPLITS))
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror})", "data.root") from None


def open_images(dataset: Dataset, layout: Layout, split: str, download: bool = False) -> Images:
    """Find the images of one split; those in class folders are decoded later, part by part.

    Args:
        dataset: the dataset to which they belong.
        layout: a layout without betons, which `seqjepa.loaders.images.beton` reads.
        split: train or test.
        download: whether missing files may be downloaded.

    Raises:
        InputError: missing, empty or unreadable files, or images that are not the dataset's.
    """
    if layout.root is not None and layout.class_folders:
        classes, paths, labels = list_images(layout.root / split)
        images = Images(dataset, ImageFiles(paths), labels, classes)
    else:
        images = dataset.read(layout.root, split, download)
    dataset.check(layout.root, images.size, len(images.classes))
    return images


def check_alike(root: Path | None, images: Mapping[str, Images | BetonImages]) -> None:
    """Refuse splits that differ in classes or image size, or that share an image file."""
    train, test = (images[split] for split in SPLITS)
    for name, one, other in (("train", train, test), ("test", test, train)):
        if only := sorted(set(one.classes) - set(other.classes)):
            some = ", ".join(map(shown, only[:3])) + (", ..." if len(only) > 3 else "")
            raise InputError(f"{root}: train and test differ in classes: {name} alone has {some}", "data.root")
    if train.classes != test.classes:
        raise InputError(f"{root}: train and test differ in the order of their classes", "data.root")
    if train.size != test.size:
        sizes = " and ".join(f"{width}x{height}" for height, width in (train.size, test.size))
        raise InputError(f"{root}: train and test differ in image size: {sizes}", "data.root")
    files, others = (getattr(split, "pixels", None) for split in (train, test))
    if isinstance(files, ImageFiles) and isinstance(others, ImageFiles):
        known = set(files.identities())
        if seen := [path for path, file in zip(others.paths, others.identities(), strict=True) if file in known]:
            raise InputError(f"{shown(seen[0])}: {len(seen)} test images are training images, by a link", "data.root")
