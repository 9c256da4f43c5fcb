"""CRATE as an encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..white_box.layers import CrateLayer, WhiteBox
from .base import ImageEncoder
from .config import CrateEncoderConfig


class CrateEncoder(ImageEncoder):
    """White-box vision transformer: patches and a class token, whose features are z.

    Source: arXiv 2306.01129; with a linear head for 1000 classes, the published sizes have the published numbers of
    parameters (6.09, 13.12, 22.80 and 77.64 million).
    """

    no_decay = ("token", "positions")

    def __init__(self, config: CrateEncoderConfig):
        super().__init__()
        width, num_layers, num_heads = config.shape
        self.patch = config.patch
        pixels = 3 * config.patch**2
        self.patches = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, width), nn.LayerNorm(width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (config.side // config.patch) ** 2 + 1, width))
        layer = config.model_copy(update={"num_heads": num_heads})
        self.layers = WhiteBox(*(CrateLayer(layer, width) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)

    def features(self, images: Tensor) -> Tensor:
        patches = self.patches(F.unfold(images, self.patch, stride=self.patch).mT)
        tokens = torch.cat([self.token.expand(len(images), -1, -1).to(patches.dtype), patches], dim=1)
        return self.norm(self.layers(tokens + self.positions)[:, 0])
