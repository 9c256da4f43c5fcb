"""Where images come from: the embedded digits, torchvision's datasets, any ImageFolder, betons."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqjepa.loaders import InputError, shown

__all__ = ["Images", "Layout", "find_layout", "read_images"]

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
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")  # others could start programs, as PostScript does
TOO_LARGE = "images of up to 89 million pixels are read"  # Pillow's bound, against files that unpack to gigabytes


@dataclass(frozen=True)
class Images:
    """One split of a dataset in memory.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        labels: int64 [N].
        classes: name of each class.
    """

    dataset: str
    pixels: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1]."""
        if self.dataset in STATISTICS:
            return STATISTICS[self.dataset]
        scaled = self.pixels.reshape(-1, self.pixels.shape[-1]).astype(np.float64) / 255
        return tuple(scaled.mean(0).tolist()), tuple(np.maximum(scaled.std(0), 1e-3).tolist())

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels))
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8"))
        return digest.hexdigest()


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
    path = Path(root).expanduser()
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


def read_images(dataset: str, layout: Layout, split: str, download: bool = False) -> Images:
    """Read one split, whole, into memory.

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
        images = _read_imagefolder(dataset, layout.root / split)
    else:
        images = _read_torchvision(dataset, layout.root, split, download)
    check_shape(dataset, str(layout.root), images.pixels.shape[1:3], len(images.classes))
    return images


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


def _read_imagefolder(dataset: str, folder: Path) -> Images:
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image
    from rich.progress import track
    from torchvision.datasets import ImageFolder

    try:
        listing = ImageFolder(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]}", "data.root") from None

    def decode(path: str) -> np.ndarray:
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise InputError(f"{shown(path)}: {image.width}x{image.height} pixels; {TOO_LARGE}", "data.root")
                if image.mode.startswith(("I", "F")) or _is_deep(image):
                    raise InputError(f"{shown(path)}: {image.mode} pixels; 8 bits a channel are allowed", "data.root")
                return np.asarray(image.convert("RGB"))
        except InputError:
            raise
        except Image.DecompressionBombError:
            raise InputError(f"{shown(path)}: {TOO_LARGE}", "data.root") from None
        except Exception as error:  # Pillow's plugins raise whatever they like
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{shown(path)}: not a readable image ({reason})", "data.root") from None

    paths = [path for path, _ in listing.samples]
    _tell_of_others(folder, paths)
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error, of one line
        decoded = pool.map(decode, paths)
        first = next(decoded)
        try:
            pixels = np.empty((len(paths), *first.shape), np.uint8)
        except MemoryError:
            needed = f"{len(paths) * first.size / 2**30:.0f} GiB for {len(paths)} images of its size"
            raise InputError(f"{paths[0]}: {first.shape[1]}x{first.shape[0]} pixels; {needed}", "data.root") from None
        pixels[0] = first
        rest = track(decoded, f"reading {folder}", total=len(paths) - 1, transient=True, disable=len(paths) < 5000)
        for position, image in enumerate(rest, start=1):
            if image.shape != first.shape:
                raise InputError(
                    f"{paths[position]}: {image.shape[1]}x{image.shape[0]} pixels, the others have "
                    f"{first.shape[1]}x{first.shape[0]}; resize them to one size",
                    "data.root",
                )
            pixels[position] = image
    return Images(dataset, pixels, np.asarray(listing.targets, np.int64), listing.classes)


def _is_deep(image: Any) -> bool:
    """Whether an image in a mode of 8 bits a channel has 16, which Pillow would cut."""
    for codec, _, _, args in image.tile:
        mode, *rest = args if isinstance(args, tuple) else (args,)
        if ";16" in str(mode) or (codec == "ppm" and rest and rest[0] > 255):  # there, the largest value
            return True
    return False


def _tell_of_others(folder: Path, taken: list[str]) -> None:
    """Say how many files of a split are passed over, because they do not bear an image's name in a class's folder."""
    found = {os.path.join(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names}
    if others := sorted(found - set(taken)):
        some = ", ".join(map(shown, others[:3])) + (", ..." if len(others) > 3 else "")
        print(f"{folder}: {len(taken)} images; {len(others)} other files passed over: {some}", file=sys.stderr)


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
