"""Codes that are drawn, and learnt by gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Codebook
from .config import GumbelQuantiserConfig


class GumbelCodebook(Codebook):
    """A code is drawn by the Gumbel-softmax of distances, straight through; in eval mode it is the nearest one.

    Distances are divided by their mean over all tokens and codes: else the draw depends on the scale of the tokens, and
    becomes uniform or constant as they shrink or grow.

    Source: Jang et al. 2016, arXiv 1611.01144; as a codebook, DALL-E (arXiv 2102.12092).
    """

    batches: Tensor  # int64, 0-dim: how many were seen

    def __init__(self, config: GumbelQuantiserConfig, width: int):
        super().__init__()
        self.config = config
        self.codes = nn.Parameter(torch.randn(config.size, width) / width**0.5)
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, codes = self.config, self.codes
        far = x.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * x @ codes.T  # [n, O, K]
        there = present[..., None].to(far.dtype)
        mean = (far * there).sum() / (there.sum() * len(codes)).clamp(min=1)
        logits = -config.sharpness * far / mean.detach().clamp(min=1e-12)
        if not self.training:
            number = logits.argmax(-1)
            return codes[number], number, logits.softmax(-1)
        first, last = config.temperatures
        share = (self.batches / config.temperature_steps).clamp(max=1).to(far.dtype)
        temperature = first + (last - first) * share
        noise = -torch.empty_like(logits).exponential_().log()
        soft = ((logits + noise) / temperature).softmax(-1)
        number = soft.argmax(-1)
        drawn = F.one_hot(number, len(codes)).to(soft.dtype) + soft - soft.detach()
        self.batches.add_(1)
        return drawn @ codes, number, logits.softmax(-1)
