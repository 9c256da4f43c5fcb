"""Invariances of z as terms: grids are encoded once more, with other colours, a little shifted, or mirrored."""

import torch
from torch import Tensor

from ...loaders.draws import ALTERED_STREAM, uniform, words
from ...loaders.grids.moves import NUM_COLOURS, OUTSIDE, sizes
from ..models.seq_jepa import Altered, Output
from .config import ShiftedConfig
from .term import Term


class Alteration(Term):
    """Mean squared difference of z of the encoded views and of the same views altered; gradients pass through both.

    All grids of a step are altered alike, on every process. Codes that follow tokens follow those of altered grids too.
    """

    name: str  # in `Altered`

    def views(self, views: Tensor, step: Tensor) -> Tensor:
        """Views [B, N, 1, S, S] of colours, 10 outside, altered as a training step (int64, 0-dim) decides."""
        place = torch.full((1,), Altered._fields.index(self.name), device=views.device)
        drawn = words(0, ALTERED_STREAM, step, place, 1, NUM_COLOURS - 1)[0, 0]
        grids = views.flatten(0, 2).round().long()
        return self.altered(grids, drawn).view_as(views).to(views.dtype)

    def altered(self, grids: Tensor, drawn: Tensor) -> Tensor:
        """Grids, int64 [n, S, S], altered as nine random words decide."""
        raise NotImplementedError

    def forward(self, output: Output, step: Tensor) -> Tensor:
        assert output.altered is not None
        return (getattr(output.altered, self.name) - output.encoded).square().mean()


class Recoloured(Alteration):
    """The colours 1 to 9 change places."""

    name = "recoloured"

    def altered(self, grids: Tensor, drawn: Tensor) -> Tensor:
        order = 1 + drawn.argsort(stable=True)
        return torch.cat([order.new_zeros(1), order, order.new_full((1,), OUTSIDE)])[grids]


class Shifted(Alteration):
    """Grids are shifted by the same shares of their heights and of their widths; what comes in is 0."""

    name = "shifted"

    def __init__(self, config: ShiftedConfig):
        super().__init__(config)
        self.most = config.most

    def altered(self, grids: Tensor, drawn: Tensor) -> Tensor:
        line = torch.arange(grids.shape[-1], device=grids.device)
        shares = uniform(drawn[:2], -self.most, self.most)
        by = ((share * size).round().long() for share, size in zip(shares, sizes(grids), strict=True))
        return _rearranged(grids, *(line - cells[:, None] for cells in by))


class Mirrored(Alteration):
    """The rows of grids are reversed, or their columns."""

    name = "mirrored"

    def altered(self, grids: Tensor, drawn: Tensor) -> Tensor:
        line = torch.arange(grids.shape[-1], device=grids.device).expand(len(grids), -1)
        rows, columns = (size[:, None] - 1 - line for size in sizes(grids))
        of_rows = drawn[0] >> 31 == 0
        return _rearranged(grids, torch.where(of_rows, rows, line), torch.where(of_rows, line, columns))


def _rearranged(grids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Grids [n, S, S] with what was in row rows[y] and column columns[x] ([n, S] each) at y, x; 0 if nothing was."""
    last = grids.shape[-1] - 1
    found = grids.gather(1, rows.clamp(0, last)[:, :, None].expand_as(grids))
    found = found.gather(2, columns.clamp(0, last)[:, None].expand_as(grids))
    there = [(place >= 0) & (place < size[:, None]) for place, size in zip((rows, columns), sizes(grids), strict=True)]
    found = torch.where(there[0][:, :, None] & there[1][:, None], found, 0)
    return torch.where(grids == OUTSIDE, OUTSIDE, found)
