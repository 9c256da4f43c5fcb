"""Codes that are drawn, and learnt by gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.distributed import total_over
from .base import Codebook
from .config import GumbelQuantiserConfig


class GumbelCodebook(Codebook):
    """A code is drawn by the Gumbel-softmax of distances, straight through; in eval mode it is the nearest one.

    Distances are divided by their mean over all tokens and codes, in eval mode by its moving average: else the draw
    depends on the scale of the tokens, and becomes uniform or constant as they shrink or grow. The temperature is that
    of the softmax through which gradients pass; what is drawn does not depend on it.

    Source: Jang et al. 2016, arXiv 1611.01144; as a codebook, DALL-E (arXiv 2102.12092).
    """

    batches: Tensor  # int64, 0-dim: forward passes in training so far
    usual: Tensor  # 0-dim, moving average of the mean distance

    def __init__(self, config: GumbelQuantiserConfig, width: int):
        super().__init__()
        self.config = config
        self.codes = nn.Parameter(torch.randn(config.size, width) / width**0.5)
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("usual", torch.ones(()))

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, codes = self.config, self.codes
        far = x.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * x @ codes.T  # [n, O, K]
        if not self.training:
            logits = -config.sharpness * far / self.usual
            number = logits.argmax(-1)
            return codes[number], number, logits.softmax(-1)
        mean = self._mean(far.detach(), present)
        logits = -config.sharpness * far / mean
        first, last = config.temperatures
        share = (self.batches / config.temperature_steps).clamp(max=1).to(far.dtype)
        temperature = first + (last - first) * share
        noise = -torch.empty_like(logits).exponential_().log()
        soft = ((logits + noise) / temperature).softmax(-1)
        number = soft.argmax(-1)
        drawn = F.one_hot(number, len(codes)).to(soft.dtype) + soft - soft.detach()
        self.batches.add_(1)
        return drawn @ codes, number, logits.softmax(-1)

    @torch.no_grad()
    def _mean(self, far: Tensor, present: Tensor) -> Tensor:
        """Mean distance in the batch of all processes, which its moving average follows."""
        there = present[..., None].to(far.dtype)
        total, count = total_over(torch.stack([(far * there).sum(), there.sum() * far.shape[-1]]), self.group)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.usual).clamp(min=1e-12)
        if not self.still:
            self.usual.copy_(torch.where(self.batches == 0, mean, self.usual.lerp(mean, 0.05)))
        return mean
