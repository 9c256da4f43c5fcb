"""Base class of sources of targets."""

import torch
from torch import Tensor, nn

from ....loaders.batch import Views


class Target(nn.Module):
    """A source of targets, built with its section and the encoder; without a teacher it needs only `features`.

    Attributes:
        joint: whether targets are encoded together with the observed views; `features` is not called then.
        detached: whether no gradient passes through them.
    """

    joint = False
    detached = True

    def features(self, encoder: nn.Module, views: Views) -> Tensor:
        """Features [B, N, D] of target views [B, N, ...] that are encoded by themselves."""
        raise NotImplementedError

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a weight of the encoder and the weight of the teacher that follows it; none without a teacher."""
        return []

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """The teacher's decay at a training step, on the device: float64, 0-dim; 1 without a teacher."""
        return torch.ones((), dtype=torch.float64, device=step.device)

    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        """Move the teacher one step towards the encoder; called after the optimiser's step.

        Args:
            encoder: the encoder that the teacher follows.
            decay: weight of the teacher in the average.
            weights: False if the optimiser has already updated the weights, so that only buffers are left.
        """
