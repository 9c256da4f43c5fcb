"""The paper's aggregator."""

import torch
from torch import Tensor, nn

from .base import NormedAggregator
from .config import TransformerConfig


class Transformer(NormedAggregator):
    """Transformer over the views with a learnt AGG token in front: tokens [B, M, T] -> [B, T].

    Post-norm layers with ReLU, and a last LayerNorm. Each layer has its own initial weights; in the reference code
    all layers start as copies of one. `time_embedding` adds a learnt position embedding; without it, only the
    actions carry the order.
    """

    no_decay = ("token", "time")

    def __init__(self, config: TransformerConfig, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        timed = config.time_embedding
        self.time = nn.Parameter(torch.empty(config.positions, width).normal_(std=0.02)) if timed else None
        heads, dropout = config.num_heads, config.dropout
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, activation="relu", batch_first=True)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.time is not None:
            tokens = tokens + self.time[: tokens.shape[1]]
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)  # [B, 1+M, T]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, 0])
