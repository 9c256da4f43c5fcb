"""Factors of the terms' weights that follow how much each term has learnt."""

import torch
from torch import Tensor, nn

from .config import GradNormConfig


class GradNorm(nn.Module):
    """Keeps the gradients of N terms at the features in proportion to how much each has still to learn.

    Term i, with loss L_i and a gradient of norm G_i, should have G_i = mean(G) * r_i^alpha, where r_i is L_i over its
    first values, divided by the mean of these ratios over terms. Each measurement moves the logarithm of the factors by
    a share of what is missing, and then scales them to a sum of N. GradNorm takes gradient steps to the same point,
    whose size depends on the scale of the terms.

    Source: Chen et al. 2018, arXiv 1711.02257, equations 1 and 2.
    """

    factors: Tensor  # [N], whose sum is N
    first: Tensor  # [N] sums of the losses of the first measurements
    measured: Tensor  # int64, 0-dim: how many there were

    def __init__(self, config: GradNormConfig, terms: int):
        super().__init__()
        self.config = config
        self.register_buffer("factors", torch.ones(terms))
        self.register_buffer("first", torch.zeros(terms))
        self.register_buffer("measured", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, norms: Tensor, losses: Tensor) -> None:
        """Take a measurement: norms of the weighted gradients, and losses without their weights, float32 [N] each."""
        config = self.config
        settled = self.measured >= config.first
        self.first.add_(torch.where(settled, 0.0, losses))
        self.measured.add_(1)
        ratios = losses / (self.first / self.measured.clamp(max=config.first)).clamp(min=1e-12)
        wanted = norms.mean() * (ratios / ratios.mean().clamp(min=1e-12)).clamp(min=1e-12) ** config.alpha
        moved = self.factors * (wanted / norms.clamp(min=1e-12)).clamp(1e-3, 1e3) ** config.rate
        moved = moved * (len(moved) / moved.sum())
        self.factors.copy_(torch.where(settled & moved.isfinite().all(), moved, self.factors))
