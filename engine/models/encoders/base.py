"""Base class of image encoders."""

import torch
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Encodes images one by one: views [B, N, C, H, W] -> features [B, N, D]. Built with its section."""

    def features(self, images: Tensor) -> Tensor:
        """Features [n, D] of images [n, C, H, W], in channels_last."""
        raise NotImplementedError

    def forward(self, views: Tensor) -> Tensor:
        images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.features(images).unflatten(0, views.shape[:2])
