"""Where the images of a dataset are: betons, class folders, or the dataset's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...configs.errors import InputError, shown
from .base import SPLITS, Dataset, Images
from .beton import BetonImages
from .files import ImageFiles
from .folder import ImageFolder, list_images

OF_TEST = ("test", "val", "valid", "validation")  # folders of images that are not trained on; the first that is there


class Layout(NamedTuple):
    """What `data.root` contains."""

    root: Path | None
    betons: Path | None = None  # folder of train.beton and test.beton
    train: Path | None = None  # folder of training images, if they are files
    test: Path | None = None  # folder of the images to validate on, if there is one

    @property
    def alone(self) -> bool:
        """Whether there is one set of images, of which some are held out."""
        return self.train is not None and self.test is None

    @property
    def name_of_test(self) -> str:
        """What the images to validate on are called in the folder."""
        return self.test.name if self.test else "test"


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
        train, test = path / "train", next((path / name for name in OF_TEST if (path / name).is_dir()), None)
        if train.is_dir() and (test or isinstance(dataset, ImageFolder)):
            return Layout(path, train=train, test=test)
        if isinstance(dataset, ImageFolder) and path.is_dir() and test is None:
            return Layout(path, train=path)
        return Layout(path)
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror})", "data.root") from None


def open_images(
    dataset: Dataset,
    layout: Layout,
    split: str,
    download: bool = False,
    size: int | None = None,
    decoder: str = "pillow",
    threads: int | None = None,
) -> Images:
    """Find the images of one split; those in files are decoded later, part by part.

    Args:
        dataset: the dataset to which they belong.
        layout: a layout without betons, which `seqjepa.loaders.images.beton` reads.
        split: train or test.
        download: whether missing files may be downloaded.
        size: pixels of a side to which image files are brought; None takes them as they are.
        decoder: what decodes image files, pillow or torchcodec.
        threads: number of threads that decode image files; None takes a few more than the machine has cores.

    Raises:
        InputError: missing, empty or unreadable files, or images that are not the dataset's.
    """
    folder = layout.train if split == "train" else layout.test
    if folder is not None:
        classes, paths, labels = list_images(folder)
        images = Images(dataset, ImageFiles(paths, size, decoder, threads), labels, classes)
    elif size is not None and not isinstance(dataset, ImageFolder):
        raise InputError(f"{dataset.name} is read as it is; image files in folders can be resized", "data.size")
    else:
        images = dataset.read(layout.root, split, download)
    dataset.check(layout.root, images.size, len(images.classes))
    return images


def check_alike(layout: Layout, images: Mapping[str, Images | BetonImages]) -> None:
    """Refuse splits that differ in classes or image size, or that share an image file."""
    train, test = (images[split] for split in SPLITS)
    both = f"{layout.root}: train and {layout.name_of_test} differ in"
    if train is test:  # a part of them is held out
        return
    for name, one, other in (("train", train, test), (layout.name_of_test, test, train)):
        if only := sorted(set(one.classes) - set(other.classes)):
            some = ", ".join(map(shown, only[:3])) + (", ..." if len(only) > 3 else "")
            raise InputError(f"{both} classes: {name} alone has {some}", "data.root")
    if train.classes != test.classes:
        raise InputError(f"{both} the order of their classes", "data.root")
    if train.size != test.size:
        sizes = " and ".join(f"{width}x{height}" for height, width in (train.size, test.size))
        raise InputError(f"{both} image size: {sizes}", "data.root")
    files, others = (getattr(split, "pixels", None) for split in (train, test))
    if isinstance(files, ImageFiles) and isinstance(others, ImageFiles):
        known = set(files.identities())
        if seen := [path for path, file in zip(others.paths, others.identities(), strict=True) if file in known]:
            problem = f"{len(seen)} {layout.name_of_test} images are training images, by a link"
            raise InputError(f"{shown(seen[0])}: {problem}", "data.root")
