"""Terms of the tokens of a view's parts: what their codes cost, how many are used, and how tokens lie to each other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.encoders.base import Tokens
from ..models.seq_jepa import Output
from ..runtime.distributed import joined_mean
from .config import RelationalConfig
from .term import Term

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


def tokens_of(output: Output) -> Tokens:
    """The tokens of an output whose encoder has some."""
    assert output.tokens is not None
    return output.tokens


class Commitment(Term):
    """Mean over tokens of the mean squared difference of a token and its codes.

    Codes that are averages get no gradient: tokens are drawn to them (VQ-VAE, arXiv 1711.00937, equation 3, last term).
    Others are learnt by it, and so are tokens if their codes are in the path.
    """

    def forward(self, output: Output, step: Tensor) -> Tensor:
        tokens = tokens_of(output)
        assert tokens.error is not None
        return tokens.error.sum() / joined_mean(tokens.present.float().sum(), self.joined).clamp(min=1)


class Usage(Term):
    """1 minus the entropy of how likely each code is on average, over its largest value, the logarithm of K.

    0 if all codes are as likely, 1 if it is always the same. The mean over parts of a token.
    """

    def forward(self, output: Output, step: Tensor) -> Tensor:
        tokens = tokens_of(output)
        assert tokens.shares is not None
        total = joined_mean(tokens.shares.float().flatten(0, 1).sum(0), self.joined)  # [G, K]
        shares = total / total.sum(1, keepdim=True).clamp(min=1e-12)
        entropy = -torch.special.xlogy(shares, shares.clamp(min=1e-12)).sum(1)
        return 1 - (entropy / math.log(shares.shape[1])).mean()


class Relational(Term):
    """How differently tokens lie to each other in the last view and in the others, which are made alike.

    The last encoded view is the one to be matched, and gets no gradient.

    - quantiles: Huber distance, with delta 1, between quantiles of the squared distances of parts that meet, over their
      mean in the view, through which no gradient passes; the mean over other views. It does not depend on the scale of
      tokens. Views in which fewer than two pairs meet are left out
    - squares: mean squared difference of the mean of the others' squared distances, slot by slot and zero between parts
      that do not meet, plus `spread` times their variance over these views; of degree four in the scale of tokens
    - squares_over_variance: the same over the variance of tokens, without a gradient through it; of degree two
    """

    quantiles: Tensor

    def __init__(self, config: RelationalConfig):
        super().__init__(config)
        self.form, self.spread = config.form, config.spread
        self.register_buffer("quantiles", torch.tensor(QUANTILES), persistent=False)

    def forward(self, output: Output, step: Tensor) -> Tensor:
        tokens = tokens_of(output)
        x, meet = tokens.tokens.float(), tokens.adjacent.float()  # [B, N, O, D], [B, N, O, O]
        square = x.square().sum(-1)
        far = (square[..., None] + square[..., None, :] - 2 * x @ x.transpose(-1, -2)).clamp(min=0) * meet
        if self.form == "quantiles":
            return self._quantiles(far, meet)
        others, last = far[:, :-1], far[:, -1].detach()
        mean = others.mean(1)
        value = (mean - last).square().mean() + self.spread * (others - mean[:, None]).square().mean()
        if self.form == "squares":
            return value
        there = tokens.present.float()[..., None]
        count = joined_mean(there.sum(), self.joined).clamp(min=1)
        first, second = (joined_mean((x.detach() ** n * there).sum((0, 1, 2)), self.joined) / count for n in (1, 2))
        return value / (second - first.square()).mean().clamp(min=1e-12)

    def _quantiles(self, far: Tensor, meet: Tensor) -> Tensor:
        pairs = meet.flatten(2)  # [B, N, O²]
        count = pairs.sum(-1, keepdim=True)
        mean = (far.flatten(2).sum(-1, keepdim=True) / count.clamp(min=1)).detach()
        order = (far.flatten(2) / mean.clamp(min=1e-12)).masked_fill(pairs == 0, torch.inf).sort(-1).values
        place = self.quantiles * (count - 1).clamp(min=0)  # [B, N, Q]
        below = place.floor().long()
        above = (below + 1).minimum((count.long() - 1).clamp(min=0))
        order = torch.where(order.isinf(), 0.0, order)
        found = order.gather(-1, below).lerp(order.gather(-1, above), place - below)
        both = ((count[:, :-1] >= 4) & (count[:, -1:] >= 4)).float()  # each pair is there twice
        lost = F.huber_loss(found[:, :-1], found[:, -1:].detach().expand_as(found[:, :-1]), reduction="none")
        return (lost.mean(-1, keepdim=True) * both).sum() / joined_mean(both.sum(), self.joined).clamp(min=1)
