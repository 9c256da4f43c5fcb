"""Base class of sources of targets."""

import torch
from torch import Tensor, nn

from ....kernels.precision import widest
from ....loaders.batch import Views


class Target(nn.Module):
    """A source of targets, built with its section, the encoder and the projector, if the network has one.

    Without a teacher it needs only `features`.

    Attributes:
        joint: whether targets are encoded together with the observed views; `features` is not called then.
        detached: whether no gradient passes through them.
        projector: the teacher's, if it has one.
    """

    joint = False
    detached = True

    def __init__(self):
        super().__init__()
        self.projector: nn.Module | None = None

    def features(self, encoder: nn.Module, views: Views) -> Tensor:
        """Features [B, N, D] of target views [B, N, ...] that are encoded by themselves."""
        raise NotImplementedError

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Projections [N, E] of features [N, D] of targets that were encoded by themselves."""
        return projector(features)

    def pairs(self, *students: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a weight of the encoder or projector and the teacher's that follows it; none without a teacher."""
        return []

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """The teacher's decay at a training step, 0-dim, float64 if the device has it; 1 without a teacher."""
        return torch.ones((), dtype=widest(step.device), device=step.device)

    def update(self, decay: Tensor, *students: nn.Module | None, weights: bool = True) -> None:
        """Move the teacher one step towards the network that it follows; called after the optimiser's step.

        Args:
            decay: weight of the teacher in the average.
            students: the encoder, and the projector if there is one.
            weights: False if the optimiser has already updated the weights, so that only buffers are left.
        """
