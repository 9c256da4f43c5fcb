"""Base class of image encoders."""

import torch
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Encodes images one by one: views [B, N, C, H, W] -> features [B, N, D]. Built with its section."""

    def features(self, images: Tensor) -> Tensor:
        """Features [n, D] of images [n, C, H, W], in channels_last."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Its blocks in order, from images [n, C, H, W] to the maps that are pooled, with channels `block_widths`."""
        raise NotImplementedError

    def pooled(self, maps: Tensor) -> Tensor:
        """Maps [n, C, h, w] of any block, averaged over places: [n, C]; those of the last block are the features."""
        return maps.mean((2, 3))

    def forward(self, views: Tensor) -> Tensor:
        images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.features(images).unflatten(0, views.shape[:2])
