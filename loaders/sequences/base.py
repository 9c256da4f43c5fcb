"""What every action sequence offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from seqjepa.loaders.config import SequenceConfig

__all__ = ["Sequence"]

# B batch, V views (V - 1 observed and the target), C channels, H x W pixels, P parameters, A action dimensions


class Sequence(ABC):
    """A way to draw view parameters, to render views, and to encode the actions between them.

    Attributes:
        num_views: V = M + 1.
        num_draws: random numbers that one view needs.
        param_dim: P.
        action_dim: A.
        factors: name of each factor of variation to its dimensions of the action.
    """

    num_draws: int
    param_dim: int
    factors: dict[str, slice]

    def __init__(self, config: SequenceConfig):
        self.config = config
        self.num_views = config.num_observed + 1

    @property
    def action_dim(self) -> int:
        return max(dims.stop for dims in self.factors.values())

    @abstractmethod
    def params(self, words: Tensor) -> Tensor:
        """Absolute parameters of each view, float32 [B, V, P], from random words, int64 [B, V, num_draws]."""

    @abstractmethod
    def render(self, images: Tensor, params: Tensor) -> Tensor:
        """Views, float32 [B, V, C, H, W] in [0, 1], of images, uint8 [B, H, W, C]."""

    @abstractmethod
    def actions(self, params: Tensor) -> Tensor:
        """Relative actions, float32 [B, V - 1, A]: action i carries view i to view i + 1."""
