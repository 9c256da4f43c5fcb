"""An aggregator without weights."""

from torch import Tensor

from ..config import MeanConfig
from .base import Aggregator


class MeanToken(Aggregator):
    """Mean of the tokens of all views: [B, M, T] -> [B, T]."""

    def __init__(self, config: MeanConfig, width: int):
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)
