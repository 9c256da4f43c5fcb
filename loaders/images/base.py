"""Base class of image datasets, and one split of a dataset."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.progress import track

from ...configs.errors import InputError
from .files import ImageFiles

SPLITS = ("train", "test")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, in [0, 1]
PART = 1 << 23  # bytes of pixels that are processed at a time
SLOW = 5000  # number of image files from which a progress bar is shown


class Dataset(ABC):
    """A set of images that `data.dataset` can name. All datasets can also be read from betons and class folders.

    Args:
        name: its key in `DATASETS`.
    """

    views: Literal["images", "grids"] = "images"  # what is in it
    side: int | None = None  # height and width of the images in pixels; None allows any size
    num_classes: int | None = None  # None allows any number
    statistics: Statistics | None = None  # published, of the training pixels; None measures them
    needs_root = True  # False for one that is installed with a package

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def read(self, root: Path | None, split: str, download: bool) -> Images:
        """Read a split from the dataset's own files.

        Args:
            root: folder without betons and class folders; None only if `needs_root` is False.
            split: train or test.
            download: whether missing files may be downloaded.

        Raises:
            InputError: the files are missing or cannot be read.
        """

    def check(self, place: Path | None, size: Sequence[int], num_classes: int) -> None:
        """Refuse images, found at `place`, whose size (H, W) or number of classes is not the dataset's."""
        height, width = size
        if self.side and (height, width) != (self.side, self.side):
            problem = f"images are {width}x{height}, {self.name} has {self.side}x{self.side}"
        elif self.num_classes and num_classes != self.num_classes:
            problem = f"{num_classes} classes, {self.name} has {self.num_classes}"
        else:
            return
        raise InputError(f"{place}: {problem}", "data.root")


class TorchvisionDataset(Dataset):
    """A dataset that torchvision downloads and reads, by the class in `torchvision.datasets` that `reader` names."""

    reader: str

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        from torchvision import datasets

        try:
            stored = getattr(datasets, self.reader)(str(root), train=split == "train", download=download)
        except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
            missing = f"no {self.name} there: neither train/ and test/, nor a .beton, nor torchvision's own files"
            reason = f"the download failed ({error})" if download else "data.download=true fetches it"
            raise InputError(f"{root}: {missing}; {reason}", "data.root") from None
        pixels = np.asarray(stored.data)
        if pixels.ndim == 3:  # gray: three equal channels
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        return Images(self, pixels, np.asarray(stored.targets, np.int64), list(stored.classes))

    def sources(self) -> list[str]:
        """The addresses from which `read` may download; one of them suffices."""
        from torchvision import datasets

        reader = getattr(datasets, self.reader)
        return (
            [reader.url] if hasattr(reader, "url") else [mirror + reader.resources[0][0] for mirror in reader.mirrors]
        )


class Measures(NamedTuple):
    """What a pass over all images found."""

    fingerprint: str  # SHA-256 of pixels and labels
    counts: np.ndarray  # int64 [C, 256]: how often each value occurs in each channel


@dataclass(eq=False)
class Images:
    """One split of a dataset, in memory or in files that are decoded part by part."""

    dataset: Dataset
    pixels: np.ndarray | ImageFiles  # uint8 [N, H, W, C]; C is 3, or 1 for grids
    labels: np.ndarray  # int64 [N]
    classes: list[str]  # name of each class
    measures: Measures | None = field(default=None, init=False, repr=False)  # once all pixels have been read

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        _, height, width, _ = self.pixels.shape
        return height, width

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.pixels.shape[-1]

    def parts(self) -> Iterator[np.ndarray]:
        """The pixels in order, some megabytes at a time: uint8 [n, H, W, C]. A whole pass also measures them."""
        count, *shape = self.pixels.shape
        step = max(1, PART // math.prod(shape))
        slow = isinstance(self.pixels, ImageFiles) and count >= SLOW
        digest, counts = hashlib.sha256(), np.zeros((shape[-1], 256), np.int64)
        for start in track(range(0, count, step), "reading images", transient=True, disable=not slow):
            part = self.pixels[start : start + step]
            digest.update(np.ascontiguousarray(part).data)
            for row, channel in zip(counts, np.moveaxis(part, -1, 0), strict=True):
                row += np.bincount(channel.ravel(), minlength=256)
            yield part
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        self.measures = Measures(digest.hexdigest(), counts)

    def statistics(self) -> Statistics:
        """Published mean and standard deviation of the pixels, or else the measured ones, of at least 0.001."""
        if self.dataset.statistics:
            return self.dataset.statistics
        mean, std = [], []
        for counts in self.measured().counts.tolist():  # Python's integers: nothing is rounded before the division
            number, total, squares = (sum(n * value**power for value, n in enumerate(counts)) for power in (0, 1, 2))
            mean.append(total / (255 * number))
            std.append(max(math.sqrt(number * squares - total**2) / (255 * number), 1e-3))
        return tuple(mean), tuple(std)

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        return self.measured().fingerprint

    def measured(self) -> Measures:
        """What a pass over all images finds; it is made once."""
        if self.measures is None:
            for _ in self.parts():
                pass
        assert self.measures is not None
        return self.measures
