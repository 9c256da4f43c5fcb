"""What is done to targets before they are compared."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...runtime.distributed import joined_mean
from .config import SoftmaxSharpeningConfig


class Sharpening(nn.Module):
    """Base class: turns targets [B, N, E] into sharpened ones of the same shape.

    Attributes:
        group: processes whose targets form one batch; None if each process has its own.
    """

    group: ProcessGroup | None = None


class SoftmaxSharpening(Sharpening):
    """Turns targets into distributions: softmax((target - center) / temperature); center is their running mean.

    In training the center is updated before it is used, as in the reference code.
    Source: DINO (arXiv 2104.14294), section 3.1.
    """

    center: Tensor

    def __init__(self, config: SoftmaxSharpeningConfig, width: int):
        super().__init__()
        self.temperature, self.momentum = config.temperature, config.center_momentum
        self.register_buffer("center", torch.zeros(width))

    def forward(self, targets: Tensor) -> Tensor:
        """Distributions of targets [B, N, E], in float32."""
        targets = targets.float()
        if self.training:
            mean = joined_mean(targets.detach().mean((0, 1)), self.group)
            self.center.lerp_(mean, 1 - self.momentum)
        return ((targets - self.center) / self.temperature).softmax(-1)
