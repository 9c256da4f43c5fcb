"""CRATE as an aggregator."""

import torch
from torch import Tensor, nn

from ..white_box.layers import CrateLayer, WhiteBox
from .base import DistanceEmbedding, NormedAggregator
from .config import CrateConfig


class Crate(NormedAggregator):
    """White-box layers over the views with a learnt AGG token in front: tokens [B, M, T] -> [B, T].

    Source: arXiv 2306.01129; with `coding=overcomplete`, arXiv 2405.20299.
    """

    no_decay = ("token",)

    def __init__(self, config: CrateConfig, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.time = DistanceEmbedding(config.positions, width) if config.time_embedding else None
        self.layers = WhiteBox(*(CrateLayer(config, width) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.time is not None:
            tokens = self.time(tokens)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)  # [B, 1+M, T]
        return self.norm(self.layers(tokens)[:, 0])
