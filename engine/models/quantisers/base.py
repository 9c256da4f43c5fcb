"""Codes of tokens, part by part.

Letters: n grids, O slots, D width of a token, G parts of a token, d = D / G, K codes of a part.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .config import CodesConfig


class Quantised(NamedTuple):
    """Tokens, and what their codes are."""

    tokens: Tensor  # [n, O, D], of codes if they are in the path, else as they were
    codes: Tensor  # int64 [n, O, G]; -1 in empty slots
    error: Tensor  # [n, O] mean squared difference of a token and its codes; 0 in empty slots
    shares: Tensor | None  # [n, G, K] how likely each code is, summed over a grid's tokens; None if codes are not drawn


class Codebook(nn.Module):
    """Codes of one part of the tokens. Built with its section and the part's width.

    Attributes:
        group: processes whose tokens form one batch in training; None if there is one.
        still: whether codes stay what the first batch made them, as a network must that is not trained.
        differentiable: whether what stands for a token is a function of it, through which a gradient passes.
    """

    group: ProcessGroup | None = None
    still = False
    differentiable = True

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of x, float32 [n, O, d], of which those of `present`, bool [n, O], count.

        Returns:
            What stands for x, [n, O, d]; numbers of codes, int64 [n, O]; and how likely each code is, [n, O, K], for
            kinds that draw codes.
        """
        raise NotImplementedError


class Quantiser(nn.Module):
    """Replaces each token by codes, or describes it by them without a gradient to it.

    Args:
        config: settings of the codes.
        width: D, a multiple of the number of parts.
    """

    def __init__(self, config: CodesConfig, width: int):
        super().__init__()
        self.in_path = config.place == "path"
        self.num_codes = config.num_codes
        self.differentiable = config.implementation().differentiable
        self.books = nn.ModuleList(config.build(width // config.groups) for _ in range(config.groups))

    def forward(self, tokens: Tensor, present: Tensor) -> Quantised:
        """Codes of tokens [n, O, D] in float32, also under autocast; empty slots, not `present` [n, O], have none."""
        with torch.autocast(tokens.device.type, enabled=False):
            given = (tokens if self.in_path else tokens.detach()).float()
            parts = given.chunk(len(self.books), -1)
            found = [book(part, present) for book, part in zip(self.books, parts, strict=True)]
            stands, codes, shares = zip(*found, strict=True)
            stand = torch.cat(stands, -1)
            error = (given - stand).square().mean(-1)
            if all(share is None for share in shares):
                likely = None
            else:
                likely = torch.stack([torch.where(present[..., None], s, 0.0).sum(1) for s in shares], 1)
            if self.in_path:  # a code that is no function of the token passes the gradient on as it is
                tokens = stand if self.differentiable else given + (stand - given).detach()
            number = torch.where(present[..., None], torch.stack(codes, -1), -1)
            return Quantised(tokens, number, torch.where(present, error, 0.0), likely)
