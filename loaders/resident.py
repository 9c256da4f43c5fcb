"""Images that live on the device as one uint8 tensor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .beton import BetonImages
from .sources import Images, Tally, enough_memory

__all__ = ["ResidentImages"]


class ResidentImages:
    """The images of a split on the device; a batch is one gather.

    Args:
        images: the split, which is read part by part.
        device: where it lives.
        chosen: positions of the images that are kept; None keeps all.
        tally: takes in all pixels as they are read, kept or not.
    """

    def __init__(
        self,
        images: Images | BetonImages,
        device: torch.device,
        chosen: np.ndarray | None = None,
        tally: Tally | None = None,
    ):
        kept = np.ones(len(images.labels), bool)
        if chosen is not None:
            kept[:] = False
            kept[chosen] = True
        shape = (int(kept.sum()), *images.shape[1:])
        with enough_memory(shape, device.type):
            self.pixels = torch.empty(shape, dtype=torch.uint8, device=device)  # [K, H, W, C]
            seen = filled = 0
            for part in images.parts():
                if tally is not None:
                    tally.add(part)
                here = kept[seen : seen + len(part)]
                seen += len(part)
                if not here.all():
                    part = part[here]
                self.pixels[filled : filled + len(part)] = torch.from_numpy(part)
                filled += len(part)
        self.labels = torch.from_numpy(images.labels).to(device)  # [N]
        # which of the kept images stands at a position of the split
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
