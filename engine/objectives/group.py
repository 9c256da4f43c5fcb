"""What the group of each factor asks of z, as terms."""

import torch
from torch import Tensor

from ..models.seq_jepa import Output
from ..models.subspaces import Coordinates, turned
from ..runtime.distributed import joined_rows
from .config import EquivarianceConfig
from .term import Term


class Equivariance(Term):
    """Error of z(g x) = ρ(g) z(x) for successive views, summed over the factors that have a group.

    A circle is charged 1 - cos of the angle by which its points, seen from its centre, turn too far, and `radius` times
    (r² / r₀² - 1)² for points at radius r. A line is charged the squared error of its shift, in standard deviations of
    the moves. r₀² is `extent` times the variance of the rest (a sum over its dimensions, taken as a constant), and
    so is the variance that a line has if its shifts are right. A constant is charged 1 for full turns.
    """

    def __init__(self, config: EquivarianceConfig):
        super().__init__(config)
        self.extent, self.radius = config.extent, config.radius

    def forward(self, output: Output, step: Tensor) -> Tensor:
        found = coordinates_of(output)
        extent = self.extent * spread(joined_rows(found.rest, self.joined)).detach()
        angle = 1 - (turned(found.circles) * found.moves.turns).sum(-1)  # [B, N - 1, C]
        radius = (found.circles.square().sum(-1) / extent - 1).square()  # [B, N, C]
        shift = (found.lines.diff(dim=1) / (2 * extent).sqrt() - found.moves.shifts).square()  # [B, N - 1, L]
        errors = (angle.mean((0, 1)), self.radius * radius.mean((0, 1)), shift.mean((0, 1)))
        return torch.cat(errors).sum()


class Rest(Term):
    """Share of the rest's variance that lies within images: 0 if no move changes it, 1 if it says nothing of the image.

    It is half the mean squared distance of successive views, over the variance.
    """

    def forward(self, output: Output, step: Tensor) -> Tensor:
        rest = joined_rows(coordinates_of(output).rest, self.joined)
        return rest.diff(dim=1).square().sum(-1).mean() / (2 * spread(rest))


def coordinates_of(output: Output) -> Coordinates:
    """Those of an output, which has them if terms read them."""
    assert output.coordinates is not None
    return output.coordinates


def spread(features: Tensor) -> Tensor:
    """Variance of features [B, N, D] over all views, summed over their dimensions, 0-dim."""
    return features.flatten(0, 1).var(0, correction=0).sum()
