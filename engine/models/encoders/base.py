"""Base class of image encoders."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """Tokens of the parts of views, such as the objects of a grid, in O slots. [...] are dimensions of views."""

    tokens: Tensor  # [..., O, D], after the quantiser if it is in the path
    present: Tensor  # bool [..., O]: the slot has a part
    adjacent: Tensor  # bool [..., O, O]: two parts meet
    codes: Tensor | None = None  # int64 [..., O, G]: codes of G parts of a token; -1 in empty slots
    error: Tensor | None = None  # [..., O] mean squared difference of a token and its codes; 0 in empty slots
    shares: Tensor | None = None  # [..., G, K] how likely each code is, summed over slots, where codes are drawn


class ImageEncoder(nn.Module):
    """Encodes images one by one: views [B, N, C, H, W] -> features [B, N, D]. Built with its section.

    One whose section `has_tokens` has `with_tokens` too.
    """

    @property
    def exported(self) -> nn.Module:
        """The module whose weights are exported: itself, or a library's network that it holds."""
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features [n, D] of images [n, C, H, W], in channels_last."""
        raise NotImplementedError

    def with_tokens(self, views: Tensor) -> tuple[Tensor, Tokens]:
        """Features [B, N, D] of views [B, N, C, H, W], and tokens of their parts, [B, N, ...]."""
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
