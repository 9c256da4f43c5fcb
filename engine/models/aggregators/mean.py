"""An aggregator without weights."""

from torch import Tensor

from .base import Aggregator
from .config import MeanConfig


class MeanToken(Aggregator):
    """Mean of the tokens of all views: [B, M, T] -> [B, T]."""

    def __init__(self, config: MeanConfig, width: int):
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)
