"""Images that live on the device as one uint8 tensor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from seqjepa.loaders.sources import Images

__all__ = ["ResidentImages"]


class ResidentImages:
    """A whole split on the device; a batch is one gather.

    Args:
        images: the split.
        device: where it lives.
    """

    def __init__(self, images: Images, device: torch.device):
        self.pixels = torch.from_numpy(images.pixels).to(device)  # [N, H, W, C]
        self.labels = torch.from_numpy(images.labels).to(device)  # [N]

    def batches(self, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (pixels uint8 [b, H, W, C], labels [b], index [b]) for each array of positions."""
        if not parts:
            return
        # the epoch's order crosses to the device once, not once a step
        order = torch.from_numpy(np.concatenate(parts)).to(self.pixels.device)
        for index in order.split([len(part) for part in parts]):
            yield self.pixels[index], self.labels[index], index
