"""Aggregators: from the tokens of a sequence, [B, M, T], to one vector, [B, T]."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Aggregator", "TransformerAggregator"]


class Aggregator(nn.Module):
    """What the rest of the code may ask of any aggregator, besides calling it with tokens [B, M, T].

    Attributes:
        no_decay: names of its own parameters that weight decay leaves alone, although they are no vectors.
        figure_names: of what `figures` returns.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def figures(self) -> dict[str, float]:
        """Numbers about its weights that each validation reports; none by default."""
        return {}


class TransformerAggregator(Aggregator):
    """Transformer over the views with a learnt AGG token in front: tokens [B, M, T] -> [B, T].

    Post-norm layers with ReLU, and a last LayerNorm. Each layer has its own initial weights; in the reference code
    all layers start as copies of one. `time_embedding` adds a learnt position embedding; without it, only the
    actions carry the order.
    """

    MAX_VIEWS = 16
    no_decay = ("token", "time")
    figure_names = ("agg_gain",)

    def __init__(self, width: int, num_layers: int, num_heads: int, dropout: float, time_embedding: bool = False):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.time = nn.Parameter(torch.empty(self.MAX_VIEWS, width).normal_(std=0.02)) if time_embedding else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, activation="relu", batch_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.time is not None:
            tokens = tokens + self.time[: tokens.shape[1]]
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)  # [B, 1+M, T]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, 0])

    def figures(self) -> dict[str, float]:
        """Root mean square of the last LayerNorm's gain: a rate of raw features can be raised by it alone."""
        return {"agg_gain": self.norm.weight.square().mean().sqrt().item()}
