"""An aggregator that weights views, channel by channel."""

import torch
from torch import Tensor, nn

from .base import Aggregator
from .config import WeightedConfig


class WeightedViews(Aggregator):
    """A weighted mean of the tokens of all views, with weights of its own in each channel: [B, M, T] -> [B, T].

    The weights are a softmax over views of a linear map of the channel's M values, which is the same for all channels:
    M² + M numbers. Views are counted from the last one, so that a shorter sequence uses the map of its last views.
    Equal tokens are left as they are.
    """

    no_decay = ("map",)

    def __init__(self, config: WeightedConfig, width: int):
        super().__init__()
        self.map = nn.Parameter(torch.zeros(config.longest, config.longest))
        self.bias = nn.Parameter(torch.zeros(config.longest))

    def forward(self, tokens: Tensor) -> Tensor:
        views = tokens.shape[1]
        weights = torch.einsum("bvt,wv->bwt", tokens, self.map[-views:, -views:].to(tokens.dtype))
        weights = (weights + self.bias[-views:, None].to(tokens.dtype)).softmax(1)
        return (weights * tokens).sum(1)
