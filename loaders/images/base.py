"""What every dataset of images offers, and one split of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from ...configs.errors import InputError
from .files import ImageFiles
from .tally import Statistics, Tally

__all__ = ["SPLITS", "Dataset", "Images"]

SPLITS = ("train", "test")
PART = 1 << 23  # bytes of pixels that are processed at a time
SLOW = 5000  # image files from which on reading them shows its progress


class Dataset(ABC):
    """A set of images with a name. Whichever it is, its images may also come as betons or in class folders.

    Args:
        name: its key in `DATASETS`.

    Attributes:
        side: height and width of its images in pixels; None allows any size.
        num_classes: number of its classes; None allows any number.
        statistics: published mean and standard deviation of the training pixels; None has them measured.
        needs_root: whether it is nowhere without a folder.
    """

    side: int | None = None
    num_classes: int | None = None
    statistics: Statistics | None = None
    needs_root = True

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def read(self, root: Path | None, split: str, download: bool) -> Images:
        """Read a split from the dataset's own files.

        Args:
            root: folder that holds neither betons nor class folders; None only where `needs_root` is False.
            split: train or test.
            download: whether missing files may be downloaded.

        Raises:
            InputError: they are not there, or cannot be read.
        """

    def check(self, place: Path | None, size: Sequence[int], num_classes: int) -> None:
        """Refuse images found at `place` whose size (H, W) or number of classes is not the dataset's."""
        height, width = size
        if self.side and (height, width) != (self.side, self.side):
            problem = f"images are {width}x{height}, {self.name} has {self.side}x{self.side}"
        elif self.num_classes and num_classes != self.num_classes:
            problem = f"{num_classes} classes, {self.name} has {self.num_classes}"
        else:
            return
        raise InputError(f"{place}: {problem}", "data.root")


@dataclass(eq=False)
class Images:
    """One split of a dataset, in memory or in files that are decoded part by part.

    Attributes:
        dataset: to which it belongs.
        pixels: uint8 [N, H, W, 3].
        labels: int64 [N].
        classes: name of each class.
    """

    dataset: Dataset
    pixels: np.ndarray | ImageFiles
    labels: np.ndarray
    classes: list[str]
    _tally: Tally | None = field(default=None, init=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        _, height, width, _ = self.pixels.shape
        return height, width

    def parts(self) -> Iterator[np.ndarray]:
        """The pixels in order, some megabytes at a time: uint8 [n, H, W, 3]. A whole pass also measures them."""
        count, *shape = self.pixels.shape
        step = max(1, PART // math.prod(shape))
        slow = isinstance(self.pixels, ImageFiles) and count >= SLOW
        tally = Tally()
        for start in track(range(0, count, step), "reading images", transient=True, disable=not slow):
            part = self.pixels[start : start + step]
            tally.add(part)
            yield part
        self._tally = tally

    def statistics(self) -> Statistics:
        """Published or else measured mean and standard deviation of the pixels."""
        return self.dataset.statistics or self._measured().statistics()

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        return self._measured().fingerprint(self.labels)

    def _measured(self) -> Tally:
        if self._tally is None:
            for _ in self.parts():
                pass
        assert self._tally is not None
        return self._tally
