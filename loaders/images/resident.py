"""Images that live on the device as one uint8 tensor."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import InputError, out_of_memory
from .base import Images
from .beton import BetonImages


class ResidentImages:
    """The images of a split on the device; a batch is one gather.

    Args:
        images: the split, which is read part by part.
        device: where the pixels are kept.
        chosen: positions of the images to keep; None keeps all.

    Raises:
        InputError: memory does not suffice, or an image cannot be read.
    """

    def __init__(self, images: Images | BetonImages, device: torch.device, chosen: np.ndarray | None = None):
        kept = np.zeros(len(images.labels), bool)
        kept[slice(None) if chosen is None else chosen] = True
        shape = (int(kept.sum()), *images.size, images.channels)
        with enough_memory(shape, device.type):
            self.pixels = torch.empty(shape, dtype=torch.uint8, device=device)  # [K, H, W, C]
            seen = filled = 0
            for part in images.parts():
                here = kept[seen : seen + len(part)]
                seen += len(part)
                if not here.all():
                    part = part[here]
                self.pixels[filled : filled + len(part)] = torch.from_numpy(part)
                filled += len(part)
        self.labels = torch.from_numpy(images.labels).to(device)  # [N]
        # row in `pixels` of each position of the split
        self.rows = None if kept.all() else torch.from_numpy(kept.cumsum() - 1).to(device)  # [N]

    def batches(self, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (pixels uint8 [b, H, W, C], labels [b], index [b]) for each array of positions."""
        if not parts:
            return
        # the epoch's order crosses to the device once, not once a step
        order = torch.from_numpy(np.concatenate(parts)).to(self.pixels.device)
        rows = order if self.rows is None else self.rows[order]
        sizes = [len(part) for part in parts]
        for index, row in zip(order.split(sizes), rows.split(sizes), strict=True):
            yield self.pixels[row], self.labels[index], index


@contextlib.contextmanager
def enough_memory(shape: tuple[int, int, int, int], device: str = "cpu") -> Iterator[None]:
    """If memory runs out while images of this shape are read, say how large they are and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        count, height, width, _ = shape
        raise InputError(
            f"{count} images of {width}x{height} pixels are {math.prod(shape) / 2**30:.3g} GiB, more memory than "
            f"{device} has left; data.loader=mapped keeps them on the disk, or take a smaller data.train_subset, "
            "data.val_subset or data.size",
            "data.root",
        ) from None
