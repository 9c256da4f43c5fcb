"""Codes that follow the tokens."""

import torch
from torch import Tensor

from ....loaders.draws import CODEBOOK_STREAM, words
from ...runtime.distributed import joined_rows, total_over
from .base import Codebook
from .config import EMAQuantiserConfig

EPS = 1e-5  # keeps a code finite that no token is near to


class EMACodebook(Codebook):
    """The code of a token is the nearest one; each code is a moving average of the tokens whose code it was.

    The codes start as tokens of the first batch, and those that are hardly used become tokens of the batch again: else
    most of a codebook is never used. Nothing changes in eval mode, and empty slots never count.

    Source: VQ-VAE (arXiv 1711.00937), appendix A.1; re-drawn codes: Jukebox (arXiv 2005.00341), section 3.1.
    """

    differentiable = False
    codes: Tensor  # [K, d]
    counts: Tensor  # [K] moving averages of the number of tokens of each code
    sums: Tensor  # [K, d] and of their sum
    batches: Tensor  # int64, 0-dim: forward passes in training so far

    def __init__(self, config: EMAQuantiserConfig, width: int):
        super().__init__()
        self.config = config
        self.register_buffer("codes", torch.zeros(config.codes, width))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, None]:
        if not self.training:
            number = self.nearest(x)
            return self.codes[number], number, None
        rows, there = x.detach().flatten(0, 1), present.flatten().float()
        with torch.no_grad():
            self._redraw(joined_rows(rows, self.group), joined_rows(there[:, None], self.group)[:, 0])
            number = self.nearest(x)
            stand = self.codes[number]  # a copy: the codes move
            if not self.still:
                self._follow(rows, there, number.flatten())
            self.batches.add_(1)
        return stand, number, None

    def nearest(self, x: Tensor) -> Tensor:
        """Numbers of the codes nearest to x [..., d]: int64 [...]; of equally near ones, the first."""
        return (self.codes.square().sum(-1) - 2 * x.detach() @ self.codes.T).argmin(-1)

    def _redraw(self, rows: Tensor, there: Tensor) -> None:
        """Put tokens of the batch [T, d] in the place of codes that are hardly used; all codes, in the first batch."""
        config, total = self.config, there.sum()
        fair = total / config.codes
        due = (self.batches % config.redraw_every == 0) & (not self.still)
        dead = ((self.counts < config.redraw * fair) & due) | (self.batches == 0)
        dead = (dead & (total > 0))[:, None]
        index = torch.arange(config.codes, device=rows.device)
        drawn = words(0, CODEBOOK_STREAM, self.batches, index, 1, 1)[:, 0, 0]
        place = drawn * total.long() >> 32  # of the tokens that are there
        chosen = rows[torch.searchsorted(there.cumsum(0), place + 1.0).clamp(max=len(rows) - 1)]
        self.codes.copy_(torch.where(dead, chosen, self.codes))
        self.counts.copy_(torch.where(dead[:, 0], fair, self.counts))
        self.sums.copy_(torch.where(dead, chosen * fair, self.sums))

    def _follow(self, rows: Tensor, there: Tensor, number: Tensor) -> None:
        """Move the averages towards the tokens [T, d] of this process, and those of the others."""
        config = self.config
        counts = torch.zeros_like(self.counts).index_add_(0, number, there)
        sums = torch.zeros_like(self.sums).index_add_(0, number, there[:, None] * rows)
        # summed by process first: an order of sums that differs between processes would let their codes part
        counts, sums = (total_over(part, self.group) for part in (counts, sums))
        self.counts.lerp_(counts, 1 - config.decay)
        self.sums.lerp_(sums, 1 - config.decay)
        total = self.counts.sum()
        smoothed = (self.counts + EPS) / (total + config.codes * EPS) * total
        self.codes.copy_(self.sums / smoothed.clamp(min=EPS)[:, None])
