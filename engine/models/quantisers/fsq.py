"""Codes by rounding."""

import math

import torch
from torch import Tensor, nn

from .base import Codebook
from .config import FSQQuantiserConfig

MARGIN = 1e-3  # by which the outermost levels lie within what tanh reaches


class FSQ(Codebook):
    """A linear map to a few numbers, each of which is bounded and rounded to one of its levels, and a map back.

    Rounding passes the gradient on as it is. Source: FSQ (arXiv 2309.15505), section 3.
    """

    bound: Tensor
    offset: Tensor
    shift: Tensor
    levels: Tensor

    def __init__(self, config: FSQQuantiserConfig, width: int):
        super().__init__()
        self.inward, self.outward = nn.Linear(width, len(config.levels)), nn.Linear(len(config.levels), width)
        bound = [(level - 1) * (1 + MARGIN) / 2 for level in config.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in config.levels]  # of an even number, none is in the middle
        shift = [math.atanh(o / b) for o, b in zip(offset, bound, strict=True)]
        for name, values in (("bound", bound), ("offset", offset), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def rounded(self, numbers: Tensor) -> Tensor:
        """Numbers [..., L] as levels, whole numbers from -(level // 2) on."""
        bounded = torch.tanh(numbers + self.shift) * self.bound - self.offset
        return bounded + (bounded.round() - bounded).detach()

    def number(self, rounded: Tensor) -> Tensor:
        """Number of each combination of levels [..., L]: int64 [...]."""
        digits = rounded.detach().round().long() + self.levels // 2
        base = torch.cat([self.levels.new_ones(1), self.levels.cumprod(0)[:-1]])
        return (digits * base).sum(-1)

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, None]:
        rounded = self.rounded(self.inward(x))
        return self.outward(rounded / (self.levels // 2)), self.number(rounded), None
