"""Betons, the files of FFCV: written by `seqjepa.loaders.write`, described by a sidecar, read by FFCV.

FFCV 1.0.2 trusts the files that it opens: a truncated one ends in SIGBUS, a damaged header in wrong images. So size and
checksum are compared with the sidecar's before a file is opened, and the size again before each epoch. FFCV's shuffling
and augmentations draw from generators that cannot be replayed; only its reader is used, in the order of our sampler.
"""

import contextlib
import importlib.util
import json
import math
import queue
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ...configs.errors import InputError, readable, shown
from ...configs.files import file_sha256
from .base import Dataset, Statistics

INSTALL_HINT = (
    "apt-get install pkg-config libopencv-dev libturbojpeg0-dev (Ubuntu: libturbojpeg-dev), "
    "then pip install 'seqjepa[ffcv]', in a clone '.[ffcv]'"
)


@dataclass(frozen=True)
class Sidecar:
    """Describes a beton; stands beside it as NAME.beton.json."""

    source: str  # name of the dataset
    split: str
    count: int
    image_size: list[int]  # height, width
    classes: list[str]
    mean: list[float]  # of the training pixels, in [0, 1]
    std: list[float]
    pixels_sha256: str  # of pixels and labels, independent of the format
    file_size: int
    file_sha256: str
    version: int = 1

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a sidecar, or raise an InputError if the file is missing, cannot be read, or is no sidecar."""
        with readable(path, "data.root"):
            if not path.exists():
                raise InputError(f"{path}: missing; `seqjepa write` makes it", "data.root")
            if not path.is_file():  # reading a pipe would never end
                raise InputError(f"{path}: not a sidecar (not a file)", "data.root")
            text = path.read_bytes()
        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except (ValueError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
            raise InputError(f"{path}: not a sidecar ({reason})", "data.root") from None

    def problem(self, split: str, count: int | None) -> str | None:
        """Why it does not fit a beton of `split` whose header counts `count` images; None if it does."""
        if self.version != 1:
            return f"its sidecar has version {self.version}; only 1 can be read"
        if self.split != split:
            return f"its sidecar says that it is the {shown(self.split)} split"
        if not 0 < self.count < 2**40 or self.count != count:
            return f"it holds {count} images, its sidecar says {self.count}"
        if len(self.image_size) != 2 or min(self.image_size) < 1 or not self.classes:
            return "its sidecar has no image size, or no classes"
        numbers = [*self.mean, *self.std]
        if not len(self.mean) == len(self.std) == 3 or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            return "its sidecar's mean and std are not three numbers each, or a std is not above 0"
        return None


def sidecar_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def has_ffcv() -> bool:
    """Whether FFCV is installed; it is not imported."""
    return importlib.util.find_spec("ffcv") is not None


def open_beton(folder: Path, dataset: Dataset, split: str) -> tuple[Path, Sidecar]:
    """Find the beton of `split` in `folder`, and check it against its sidecar.

    Raises:
        InputError: it is missing, damaged, unreadable, or of another dataset.
    """
    path = folder / f"{split}.beton"
    with readable(path, "data.root"):
        if not path.is_file():
            raise InputError(f"{path}: missing; `seqjepa write` makes it", "data.root")
        sidecar = Sidecar.read(sidecar_path(path))
        with path.open("rb") as file:
            header = file.read(16)  # uint16 version, uint16 fields, uint32 page size, uint64 samples
        count = int.from_bytes(header[8:], "little") if len(header) == 16 else None
        if problem := sidecar.problem(split, count):
            raise InputError(f"{path}: {problem}; write it again", "data.root")
        if sidecar.source != dataset.name:
            raise InputError(f"{path}: holds {shown(sidecar.source)}, data.dataset is {dataset.name}", "data.root")
        _check_size(path, sidecar)
        if file_sha256(path) != sidecar.file_sha256:
            raise InputError(f"{path}: damaged, its checksum differs from the sidecar's; write it again", "data.root")
    dataset.check(path, sidecar.image_size, len(sidecar.classes))
    return path, sidecar


def _check_size(path: Path, sidecar: Sidecar) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size != sidecar.file_size:
        raise InputError(f"{path}: {size} bytes, its sidecar says {sidecar.file_size}; write it again", "data.root")


class BetonImages:
    """A split that FFCV reads from a beton.

    Args:
        path: a beton that has been checked.
        sidecar: its description.
        batch_size: number of images that `parts` reads at a time.
        threads: number of FFCV's threads.
        device: where batches go.

    Raises:
        InputError: FFCV cannot be imported.
    """

    channels = 3

    def __init__(self, path: Path, sidecar: Sidecar, *, batch_size: int, threads: int, device: torch.device):
        try:
            from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
            from ffcv.loader import Loader, OrderOption
            from ffcv.transforms import ToTensor
        except ImportError as error:
            problem = f"ffcv reads betons and cannot be imported ({error}); {INSTALL_HINT}"
            raise InputError(problem, "data.loader") from None
        self.path, self.sidecar, self.device = path, sidecar, device
        self.loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=threads,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,  # follows traversal_order.indices, which `batches` sets
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
        )
        height, width = sidecar.image_size
        self.size, self.classes = (height, width), sidecar.classes
        self.labels = self.loader.reader.metadata["f1"].astype(np.int64)  # [N]

    def statistics(self) -> Statistics:
        """Mean and standard deviation of the training pixels."""
        return tuple(self.sidecar.mean), tuple(self.sidecar.std)

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels: the same images in the same order, however they were stored."""
        return self.sidecar.pixels_sha256

    def parts(self) -> Iterator[np.ndarray]:
        """The pixels in order, a batch at a time: uint8 [n, H, W, 3]."""
        positions = np.arange(self.sidecar.count)
        size = self.loader.batch_size
        for pixels, _, _ in self.batches(np.split(positions, range(size, len(positions), size))):
            yield pixels.cpu().numpy()

    def batches(self, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (pixels uint8 [b, H, W, C], labels [b], index [b]) for each array of positions."""
        if not parts:
            return
        _check_size(self.path, self.sidecar)
        order = np.concatenate(parts)
        self.loader.traversal_order.indices = order.astype(np.uint64)
        self.loader.first_traversal_order = range(len(order))  # len(loader) counts this; it would be stale
        self.loader.batch_size = max(1, *map(len, parts))  # a process that reads alone takes whole batches
        order = torch.from_numpy(order).to(self.device)
        reader = iter(self.loader)
        try:
            for index in order.split([len(part) for part in parts]):
                if not len(index):
                    yield torch.empty((0, *self.size, 3), dtype=torch.uint8, device=self.device), index.clone(), index
                    continue
                pixels, labels = next(reader)
                pixels = pixels.view(len(index), *self.size, 3)  # a batch of one has lost its first axis
                yield self._own(pixels), self._own(labels.view(-1)), index
        finally:
            # FFCV's thread may still wait for room in its queue, because the epoch was left early: it must end before
            # the memory that it writes to is freed
            reader.terminate_event.set()
            while reader.is_alive():
                with contextlib.suppress(queue.Empty):
                    reader.output_queue.get(timeout=0.05)
            reader.close()

    def _own(self, buffer: Tensor) -> Tensor:
        """A copy on the device: FFCV overwrites its buffers, even while a GPU still reads them."""
        if self.device.type == "cuda":
            # through pinned memory of our own, so that the host may run ahead
            return torch.empty_like(buffer, pin_memory=True).copy_(buffer).to(self.device, non_blocking=True)
        return buffer.clone()
