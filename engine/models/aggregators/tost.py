"""ToST as an aggregator."""

import torch
from torch import Tensor, nn

from ..white_box.layers import ClassAttention, TostLayer, WhiteBox
from .base import DistanceEmbedding, NormedAggregator
from .config import TostConfig


class Tost(NormedAggregator):
    """Token-statistics layers over the views, which an AGG token then reads: tokens [B, M, T] -> [B, T].

    The AGG token takes no part in the statistics. Time and memory are linear in M. Source: arXiv 2412.17810.
    """

    no_decay = ("token",)

    def __init__(self, config: TostConfig, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.time = DistanceEmbedding(config.positions, width) if config.time_embedding else None
        self.layers = WhiteBox(*(TostLayer(config, width) for _ in range(config.num_layers)))
        self.readout = nn.ModuleList(
            ClassAttention(width, config.num_heads, config.gain) for _ in range(config.readout_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.time is not None:
            tokens = self.time(tokens)
        tokens = self.layers(tokens)
        readout = self.token.expand(len(tokens), -1, -1).to(tokens.dtype)
        for layer in self.readout:
            readout = layer(readout, tokens)
        return self.norm(readout[:, 0])
