"""Betons, FFCV's files: written by `seqjepa.loaders.write`, described by a sidecar, read by FFCV.

FFCV 1.0.2 trusts what it opens: a truncated file ends in SIGBUS, a damaged header in nonsense. So the sidecar's size
and checksum are compared first, and the size again before each epoch. Its shuffling and its augmentations draw from
generators that cannot be replayed; only its reading is used, in the order that the project's sampler gives.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import queue
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ..configs.errors import InputError, readable, shown
from ..configs.files import file_sha256

__all__ = ["BetonImages", "Sidecar", "has_ffcv", "open_beton", "sidecar_path"]

INSTALL_HINT = (
    "apt-get install pkg-config libopencv-dev libturbojpeg0-dev (Ubuntu: libturbojpeg-dev), "
    "then pip install 'seqjepa[ffcv]'"
)


@dataclass(frozen=True)
class Sidecar:
    """What a beton holds; JSON beside it as NAME.beton.json."""

    source: str  # name of the dataset
    split: str
    count: int
    image_size: list[int]  # height, width
    classes: list[str]
    mean: list[float]  # of the training pixels, in [0, 1]
    std: list[float]
    pixels_sha256: str  # of pixels and labels, whatever they are stored in
    file_size: int
    file_sha256: str
    version: int = 1

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read the sidecar at `path`.

        Raises:
            InputError: it is missing, cannot be read, or is no sidecar.
        """
        with readable(path, "data.root"):
            if not path.exists():
                raise InputError(f"{path}: missing; python -m seqjepa.loaders.write makes it", "data.root")
            if not path.is_file():  # a pipe would never end
                raise InputError(f"{path}: not a sidecar (not a file)", "data.root")
            text = path.read_bytes()
        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except (ValueError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
            raise InputError(f"{path}: not a sidecar ({reason})", "data.root") from None

    def problem(self, split: str, count: int | None) -> str | None:
        """What is wrong with it, in words, beside a beton of `count` images that is to be of `split`."""
        statistics = len(self.mean) == len(self.std) == 3 and all(map(math.isfinite, self.mean + self.std))
        if self.version != 1:
            return f"its sidecar is of version {self.version}, 1 can be read"
        if self.split != split:
            return f"its sidecar says that it is the {shown(self.split)} split"
        if not 0 < self.count < 2**40 or self.count != count:
            return f"it holds {count} images, its sidecar says {self.count}"
        if len(self.image_size) != 2 or min(self.image_size) < 1 or not self.classes:
            return "its sidecar has no image size, or no classes"
        if not statistics or min(self.std) <= 0:
            return "its sidecar's mean and std are not three numbers each, or a std is not above 0"
        return None


def _header_count(path: Path) -> int | None:
    """Number of images by the header of a beton, in FFCV's layout; None where there is no header."""
    with path.open("rb") as file:
        header = file.read(16)  # uint16 version, uint16 fields, uint32 page size, uint64 samples
    return int.from_bytes(header[8:16], "little") if len(header) == 16 else None


def sidecar_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def has_ffcv() -> bool:
    """Whether FFCV is installed; it is not imported."""
    return importlib.util.find_spec("ffcv") is not None


def open_beton(folder: Path, dataset: str, split: str) -> tuple[Path, Sidecar]:
    """Find, and check against its sidecar, the beton of `split` in `folder`.

    Raises:
        InputError: missing, damaged, not to be read, or of another dataset.
    """
    path = folder / f"{split}.beton"
    with readable(path, "data.root"):
        return path, _checked(path, dataset, split)


def _checked(path: Path, dataset: str, split: str) -> Sidecar:
    """The sidecar of a beton that is as it says."""
    if not path.is_file():
        raise InputError(f"{path}: missing; python -m seqjepa.loaders.write makes it", "data.root")
    sidecar = Sidecar.read(sidecar_path(path))
    if problem := sidecar.problem(split, _header_count(path)):
        raise InputError(f"{path}: {problem}; write it again", "data.root")
    if sidecar.source != dataset:
        raise InputError(f"{path}: holds {shown(sidecar.source)}, data.dataset is {dataset}", "data.root")
    _check_size(path, sidecar)
    if file_sha256(path) != sidecar.file_sha256:
        raise InputError(f"{path}: damaged, its checksum differs from the sidecar's; write it again", "data.root")
    return sidecar


def _check_size(path: Path, sidecar: Sidecar) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size != sidecar.file_size:
        raise InputError(f"{path}: {size} bytes, its sidecar says {sidecar.file_size}; write it again", "data.root")


class BetonImages:
    """A split that FFCV reads from a beton.

    Args:
        path: the beton, already checked.
        sidecar: its description.
        batch_size: largest number of images in a batch of this process.
        threads: of FFCV's reader.
        device: where batches go.
    """

    def __init__(self, path: Path, sidecar: Sidecar, *, batch_size: int, threads: int, device: torch.device):
        try:
            from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
            from ffcv.loader import Loader, OrderOption
            from ffcv.transforms import ToTensor
        except ImportError as error:
            raise InputError(
                f"ffcv reads betons and cannot be imported ({error}); {INSTALL_HINT}", "data.loader"
            ) from None
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

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return (self.sidecar.count, *self.sidecar.image_size, 3)

    @property
    def classes(self) -> list[str]:
        """Name of each class."""
        return self.sidecar.classes

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.loader.reader.metadata["f1"].astype(np.int64)

    def parts(self) -> Iterator[np.ndarray]:
        """All pixels in order, a batch at a time: uint8 [n, H, W, 3]."""
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
        self.loader.first_traversal_order = self.loader.traversal_order.indices  # what its stale len() counts
        order = torch.from_numpy(order).to(self.device)
        reader = iter(self.loader)
        try:
            for index in order.split([len(part) for part in parts]):
                if not len(index):
                    yield self._empty(index)
                    continue
                pixels, labels = next(reader)
                # a batch of one has lost its first axis
                pixels = pixels.view(len(index), *self.sidecar.image_size, 3)
                yield self._own(pixels), self._own(labels.view(-1)), index
        finally:
            # an epoch that is left early has a reader thread behind it, which may be waiting for room in its queue:
            # let it end before its memory goes
            reader.terminate_event.set()
            while reader.is_alive():
                with contextlib.suppress(queue.Empty):
                    reader.output_queue.get(timeout=0.05)
            reader.close()

    def _own(self, buffer: Tensor) -> Tensor:
        """A copy on the device: FFCV overwrites its buffers, even while a GPU is still reading them."""
        if self.device.type == "cuda":
            # through pinned memory of our own, so that the host may run ahead
            return torch.empty_like(buffer, pin_memory=True).copy_(buffer).to(self.device, non_blocking=True)
        return buffer.clone()

    def _empty(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (0, *self.sidecar.image_size, 3)
        return torch.empty(shape, dtype=torch.uint8, device=self.device), index.clone(), index
