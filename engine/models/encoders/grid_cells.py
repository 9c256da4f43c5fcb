"""A transformer on the cells of a grid."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....loaders.grids.moves import OUTSIDE
from .base import ImageEncoder
from .config import GridCellsConfig


class GridCells(ImageEncoder):
    """Pre-norm transformer; a token holds the colours of `patch` x `patch` cells, and a further one becomes z."""

    no_decay = ("token", "positions")

    def __init__(self, config: GridCellsConfig):
        super().__init__()
        self.patch, width = config.patch, config.dim
        self.embedding = nn.Linear((OUTSIDE + 1) * config.patch**2, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (config.side // config.patch) ** 2, width).normal_(std=0.02))
        how: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, config.num_heads, 2 * width, **how) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def features(self, images: Tensor) -> Tensor:
        planes = F.one_hot(images[:, 0].round().long(), OUTSIDE + 1).movedim(-1, 1).to(images.dtype)
        tokens = self.embedding(F.unfold(planes, self.patch, stride=self.patch).mT) + self.positions
        tokens = torch.cat([self.token.expand(len(images), -1, -1).to(tokens.dtype), tokens], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, 0])
