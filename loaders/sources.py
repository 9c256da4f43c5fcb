"""Where images come from: the embedded digits, torchvision's datasets, any ImageFolder, betons."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from ..configs.errors import InputError, shown
from .image_folder import ImageFiles, list_images

__all__ = [
    "Images",
    "Layout",
    "Tally",
    "check_alike",
    "enough_memory",
    "find_layout",
    "lacks_memory",
    "open_images",
    "read_images",
]

SPLITS = ("train", "test")

# published mean and standard deviation of the training pixels, in [0, 1]; others are measured
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
}
# side and number of classes that a dataset of this name has
SHAPES = {"digits": (24, 10), "cifar10": (32, 10), "cifar100": (32, 100), "mnist": (28, 10)}
DIGITS_TEST = 359  # a fifth
PART = 1 << 23  # bytes of pixels that are looked at together


class Tally:
    """Checksum, mean and deviation of the pixels of a split, gathered part by part, in integers: nothing is rounded.

    Args:
        dataset: whose mean and standard deviation may be published ones.
    """

    def __init__(self, dataset: str):
        self.dataset = dataset
        self.digest = hashlib.sha256()
        self.counts = np.zeros((3, 256), np.int64)  # of each value of each channel

    def add(self, pixels: np.ndarray) -> None:
        """Take in the next images, uint8 [n, H, W, 3]."""
        self.digest.update(np.ascontiguousarray(pixels))
        for counts, channel in zip(self.counts, np.moveaxis(pixels, -1, 0), strict=True):
            counts += np.bincount(channel.ravel(), minlength=256)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1]."""
        if self.dataset in STATISTICS:
            return STATISTICS[self.dataset]
        mean, std = [], []
        for counts in self.counts.tolist():
            number, total = sum(counts), sum(value * count for value, count in enumerate(counts))
            squares = sum(value**2 * count for value, count in enumerate(counts))
            mean.append(total / (255 * number))
            std.append(max(math.sqrt(number * squares - total**2) / (255 * number), 1e-3))
        return tuple(mean), tuple(std)

    def fingerprint(self, labels: np.ndarray) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        digest = self.digest.copy()
        digest.update(np.ascontiguousarray(labels, dtype="<i8"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Images:
    """One split of a dataset, in memory or in files that are decoded part by part.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        labels: int64 [N].
        classes: name of each class.
    """

    dataset: str
    pixels: np.ndarray | ImageFiles
    labels: np.ndarray
    classes: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return self.pixels.shape

    def parts(self) -> Iterator[np.ndarray]:
        """The pixels in order, some megabytes at a time: uint8 [n, H, W, 3]."""
        count, *shape = self.shape
        step = max(1, PART // math.prod(shape))
        starts = range(0, count, step)
        slow = isinstance(self.pixels, ImageFiles) and count >= 5000
        for start in track(starts, "reading images", transient=True, disable=not slow):
            yield self.pixels[start : start + step]

    def _tally(self) -> Tally:
        tally = Tally(self.dataset)
        for pixels in self.parts():
            tally.add(pixels)
        return tally

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1]."""
        return self._tally().statistics()

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        return self._tally().fingerprint(self.labels)


@dataclass(frozen=True)
class Layout:
    """How the files under `data.root` are arranged."""

    kind: str  # embedded, imagefolder, beton or torchvision
    root: Path | None


def find_layout(dataset: str, root: str | None) -> Layout:
    """Tell what stands at `root`.

    Raises:
        InputError: `root` is missing, or absent where the dataset needs one.
    """
    if root is None:
        if dataset == "digits":
            return Layout("embedded", None)
        raise InputError(f"{dataset} needs a folder; none was given", "data.root")
    try:
        return _layout_at(dataset, root, Path(root).expanduser())
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror})", "data.root") from None


def _layout_at(dataset: str, root: str, path: Path) -> Layout:
    if path.suffix == ".beton":
        if not path.is_file():
            raise InputError(f"{root}: no such file", "data.root")
        if path.name not in ("train.beton", "test.beton"):
            raise InputError(f"{root}: betons are read as a pair, train.beton and test.beton", "data.root")
        return Layout("beton", path.parent)
    if (path / "train.beton").exists() or (path / "test.beton").exists():
        return Layout("beton", path)
    if all((path / split).is_dir() for split in SPLITS):
        return Layout("imagefolder", path)
    if dataset == "imagefolder":
        problem = "needs train/ and test/, each with a folder for each class" if path.is_dir() else "no such folder"
        raise InputError(f"{root}: {problem}", "data.root")
    if dataset == "digits":
        raise InputError(f"{root}: digits are embedded, or betons; no .beton is there", "data.root")
    return Layout("torchvision", path)


def open_images(dataset: str, layout: Layout, split: str, download: bool = False) -> Images:
    """Find the images of one split; those of a folder are decoded later, part by part.

    Args:
        dataset: digits, cifar10, cifar100, mnist or imagefolder.
        layout: from `find_layout`; betons are read by `seqjepa.loaders.beton`.
        split: train or test.
        download: whether torchvision may fetch what is missing.

    Raises:
        InputError: missing, empty or unreadable files, or images that are not what `dataset` says.
    """
    if layout.kind == "embedded":
        images = _read_digits(split)
    elif layout.kind == "imagefolder":
        classes, paths, labels = list_images(layout.root / split)
        images = Images(dataset, ImageFiles(paths), labels, classes)
    else:
        images = _read_torchvision(dataset, layout.root, split, download)
    check_shape(dataset, str(layout.root), images.shape[1:3], len(images.classes))
    return images


def read_images(dataset: str, layout: Layout, split: str, download: bool = False) -> Images:
    """Read one split, whole, into memory; arguments and errors are those of `open_images`."""
    images = open_images(dataset, layout, split, download)
    with enough_memory(images.shape):
        pixels = np.empty(images.shape, np.uint8)
        filled = 0
        for part in images.parts():
            pixels[filled : filled + len(part)] = part
            filled += len(part)
    return replace(images, pixels=pixels)


@contextlib.contextmanager
def enough_memory(shape: tuple[int, ...], device: str = "cpu") -> Iterator[None]:
    """Within it, images of a shape are read: where memory does not suffice, say how large they are and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        count, height, width, _ = shape
        raise InputError(
            f"{count} images of {width}x{height} pixels are {math.prod(shape) / 2**30:.3g} GiB, more memory than "
            f"{device} has left; betons with data.loader=ffcv stay on the disk, data.train_subset, data.val_subset and "
            "smaller images need less",
            "data.root",
        ) from None


def lacks_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error says that memory has run out; torch's are RuntimeErrors."""
    words = ("out of memory", "allocate memory", "enough memory", "new thread")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def check_alike(root: Path | None, splits: Mapping[str, Any]) -> None:
    """Refuse splits, anything with `classes` and a `shape`, that differ in classes or image size, or share a file."""
    for one, other in (SPLITS, SPLITS[::-1]):
        if only := sorted(set(splits[one].classes) - set(splits[other].classes)):
            some = ", ".join(map(shown, only[:3])) + (", ..." if len(only) > 3 else "")
            raise InputError(f"{root}: train and test differ in classes: {one} alone has {some}", "data.root")
    if splits["train"].classes != splits["test"].classes:
        raise InputError(f"{root}: train and test differ in the order of their classes", "data.root")
    sizes = [f"{width}x{height}" for _, height, width, _ in (splits[split].shape for split in SPLITS)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{root}: train and test differ in image size: {' and '.join(sizes)}", "data.root")
    train, test = (getattr(splits[split], "pixels", None) for split in SPLITS)
    if isinstance(train, ImageFiles) and isinstance(test, ImageFiles):
        known = set(train.identities())
        if seen := [path for path, file in zip(test.paths, test.identities(), strict=True) if file in known]:
            raise InputError(f"{shown(seen[0])}: {len(seen)} test images are training images, by a link", "data.root")


def check_shape(dataset: str, root: str, size: tuple[int, int], num_classes: int) -> None:
    """Refuse images whose size or number of classes is not that of `dataset`."""
    if dataset not in SHAPES:
        return
    side, expected_classes = SHAPES[dataset]
    if tuple(size) != (side, side):
        raise InputError(f"{root}: images are {size[1]}x{size[0]}, {dataset} has {side}x{side}", "data.root")
    if num_classes != expected_classes:
        raise InputError(f"{root}: {num_classes} classes, {dataset} has {expected_classes}", "data.root")


def _read_digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, doubled and set on a black ground of 24x24."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.zeros((len(small), 24, 24, 3), np.uint8)
    for canvas, digit in zip(pixels, small, strict=True):
        canvas[4:20, 4:20] = np.asarray(Image.fromarray(digit).resize((16, 16), Image.Resampling.BILINEAR))[..., None]
    # the file repeats 0 to 9 and goes by writer: a permutation puts classes and writers in both splits
    order = list(range(len(small)))
    random.Random(0).shuffle(order)
    chosen = sorted(order[:DIGITS_TEST] if split == "test" else order[DIGITS_TEST:])
    return Images("digits", pixels[chosen], digits.target[chosen].astype(np.int64), [str(d) for d in range(10)])


def _read_torchvision(dataset: str, root: Path, split: str, download: bool) -> Images:
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST}[dataset]
    try:
        stored = reader(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        wanted = f"no {dataset} there: neither train/ and test/, nor a .beton, nor torchvision's own files"
        reason = f"the download failed ({error})" if download else "data.download=true fetches it"
        raise InputError(f"{root}: {wanted}; {reason}", "data.root") from None
    pixels = np.asarray(stored.data)
    if pixels.ndim == 3:  # MNIST is gray: three equal channels
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    return Images(dataset, pixels, np.asarray(stored.targets, np.int64), list(stored.classes))
