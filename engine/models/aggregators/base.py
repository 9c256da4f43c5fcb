"""Base class of aggregators."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Aggregator(nn.Module):
    """A network from tokens [B, M, T] to an aggregate [B, T], built with its section and the token width T.

    Attributes:
        no_decay: names of parameters without weight decay, besides vectors such as biases, which never have it.
        figure_names: keys of what `figures` returns.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def figures(self) -> dict[str, float]:
        """Numbers about its weights that each validation reports; none by default."""
        return {}


class NormedAggregator(Aggregator):
    """An aggregator that ends with a LayerNorm, `norm`."""

    figure_names = ("agg_gain",)
    norm: nn.LayerNorm

    def figures(self) -> dict[str, float]:
        """Root mean square of the LayerNorm's gain: a rate of raw features can be raised by it alone."""
        return {"agg_gain": self.norm.weight.square().mean().sqrt().item()}


class DistanceEmbedding(nn.Module):
    """Adds to each token [B, M, T] a learnt embedding of its distance to the target, the end of the sequence.

    A longer sequence has further distances, and the last views keep theirs.
    """

    no_decay = ("weight",)

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, width).normal_(std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight[: tokens.shape[1]].flip(0)
