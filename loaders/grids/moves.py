"""The ten moves that programs on grids are made of, for whole batches.

A grid is int64 [S, S]: colours 0 to 9 in the h x w cells of its upper left corner, and `OUTSIDE` elsewhere. A step is
int64 [10]: the number of a move, and its parameters in the columns that are named here; a move reads those that it has.
"""

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = 10
NUM_COLOURS = 10


class Move(IntEnum):
    """Each move, and the columns of its parameters."""

    MIRROR_X = 0  # rows in reverse
    MIRROR_Y = 1  # columns in reverse
    ROTATE = 2  # TURNS quarter turns clockwise
    TRANSLATE = 3  # by DX to the right and DY down; FIRST is what comes in
    RECOLOUR = 4  # FIRST becomes SECOND
    INVERT = 5  # the i-th of n colours becomes the (n - 1 - i)-th
    THRESHOLD = 6  # colours above LEVEL become SECOND, the others FIRST
    FLOOD = 7  # the region of cell Y, X, of one colour, becomes FIRST
    EXTRACT = 8  # the region around Y, X that is not of the commonest colour, cropped; FIRST is what surrounds it
    MERGE = 9  # cells of FIRST and SECOND that touch, corners too, become THIRD


NAMES = tuple(move.name.lower() for move in Move)
MOVE, TURNS, DX, DY, Y, X, LEVEL, FIRST, SECOND, THIRD = range(10)
COLUMNS = ("move", "turns", "dx", "dy", "y", "x", "level", "first", "second", "third")


def sizes(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths, int64 [N] each, of grids [N, S, S]."""
    inside = grids != OUTSIDE
    return inside[:, :, 0].sum(1), inside[:, 0, :].sum(1)


def present(grids: Tensor) -> Tensor:
    """Which colours a grid has, bool [N, 10]."""
    return counts(grids) > 0


def counts(grids: Tensor) -> Tensor:
    """Number of cells of each colour, int64 [N, 10]."""
    found = torch.zeros(len(grids), NUM_COLOURS + 1, dtype=torch.int64, device=grids.device)
    cells = grids.flatten(1)
    return found.scatter_add_(1, cells, torch.ones_like(cells))[:, :NUM_COLOURS]


def commonest(grids: Tensor) -> Tensor:
    """The colour of most cells, int64 [N]; of several, the one that comes first, row by row."""
    cells = grids.flatten(1)
    number = counts(grids)
    of_cell = F.pad(number, (0, 1), value=-1).gather(1, cells)
    return cells.gather(1, of_cell.argmax(1, keepdim=True))[:, 0]  # argmax takes the first


def apply(grids: Tensor, steps: Tensor) -> Tensor:
    """Grids after one step each.

    Args:
        grids: int64 [N, S, S].
        steps: int64 [N, 10].

    Returns:
        int64 [N, S, S].
    """
    move = steps[:, MOVE]
    found = _recoloured(_moved(grids, steps), steps)
    for number, change in ((Move.FLOOD, _flooded), (Move.EXTRACT, _extracted), (Move.MERGE, _merged)):
        rows = (move == number).nonzero()[:, 0]
        if len(rows):
            found[rows] = change(grids[rows], steps[rows])
    return found


def _moved(grids: Tensor, steps: Tensor) -> Tensor:
    """Mirrored, turned or shifted, where a step says so."""
    side = grids.shape[-1]
    height, width = (size[:, None, None] for size in sizes(grids))
    move, turns, dx, dy, fill = (steps[:, column, None, None] for column in (MOVE, TURNS, DX, DY, FIRST))
    turns = torch.where(move == Move.ROTATE, turns % 4, 0)
    line = torch.arange(side, device=grids.device)
    y, x = line[None, :, None], line[None, None, :]
    odd = turns % 2 == 1
    inside = (y < torch.where(odd, width, height)) & (x < torch.where(odd, height, width))
    source_y = torch.where(turns == 1, height - 1 - x, torch.where(turns == 2, height - 1 - y, y))
    source_x = torch.where(turns == 1, y, torch.where(turns == 2, width - 1 - x, x))
    source_y, source_x = torch.where(turns == 3, x, source_y), torch.where(turns == 3, width - 1 - y, source_x)
    source_y = torch.where(move == Move.MIRROR_X, height - 1 - y, source_y)
    source_x = torch.where(move == Move.MIRROR_Y, width - 1 - x, source_x)
    shifted = move == Move.TRANSLATE
    source_y, source_x = torch.where(shifted, y - dy, source_y), torch.where(shifted, x - dx, source_x)
    known = (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
    place = (source_y.clamp(0, side - 1) * side + source_x.clamp(0, side - 1)).flatten(1)
    found = torch.where(known, grids.flatten(1).gather(1, place).view_as(grids), fill)
    return torch.where(inside, found, OUTSIDE)


def _recoloured(grids: Tensor, steps: Tensor) -> Tensor:
    """Each colour replaced by another, where a step says so."""
    colours = torch.arange(NUM_COLOURS, device=grids.device)
    move, level, first, second = (steps[:, column, None] for column in (MOVE, LEVEL, FIRST, SECOND))
    table = colours.expand(len(grids), -1)
    table = torch.where((move == Move.RECOLOUR) & (table == first), second, table)
    table = torch.where(move == Move.THRESHOLD, torch.where(colours > level, second, first), table)
    there = present(grids)
    ascending = (~there).long().argsort(dim=1, stable=True)
    rank = there.sum(1, keepdim=True) - there.long().cumsum(1)
    inverted = ascending.gather(1, rank.clamp(min=0))
    table = torch.where((move == Move.INVERT) & there, inverted, table)
    return F.pad(table, (0, 1), value=OUTSIDE).gather(1, grids.flatten(1)).view_as(grids)


def region(mask: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The cells of a mask that are connected by edges to one of its cells; none if that cell is not in it.

    Args:
        mask: bool [N, S, S].
        y, x: of the cell, int64 [N].

    Returns:
        bool [N, S, S].
    """
    found = torch.zeros_like(mask)
    rows = torch.arange(len(mask), device=mask.device)
    found[rows, y, x] = mask[rows, y, x]
    # cells of the mask between which there is no other cell have the same number: a run of the row or the column
    runs = [((~mask).long().cumsum(dim), dim) for dim in (2, 1)]
    while True:
        before = found
        for run, dim in runs:
            shape = [*mask.shape]
            shape[dim] += 1
            reached = torch.zeros(shape, dtype=torch.uint8, device=mask.device)
            reached.scatter_reduce_(dim, run, found.byte(), "amax")
            found = reached.gather(dim, run).bool() & mask
        if torch.equal(found, before):
            return found


def _at(grids: Tensor, steps: Tensor) -> Tensor:
    return grids[torch.arange(len(grids), device=grids.device), steps[:, Y], steps[:, X]]


def _flooded(grids: Tensor, steps: Tensor) -> Tensor:
    same = grids == _at(grids, steps)[:, None, None]
    return torch.where(region(same, steps[:, Y], steps[:, X]), steps[:, FIRST, None, None], grids)


def _extracted(grids: Tensor, steps: Tensor) -> Tensor:
    side, surrounding = grids.shape[-1], steps[:, FIRST, None, None]
    shape = region((grids != commonest(grids)[:, None, None]) & (grids != OUTSIDE), steps[:, Y], steps[:, X])
    rows, columns = shape.any(2), shape.any(1)
    line = torch.arange(side, device=grids.device)
    top, left = rows.byte().argmax(1), columns.byte().argmax(1)
    height = torch.where(rows, line, 0).amax(1) - top + 1
    width = torch.where(columns, line, 0).amax(1) - left + 1
    found = torch.where(shape, grids, surrounding)
    place_y = (top[:, None] + line).clamp(max=side - 1)[:, :, None]
    place_x = (left[:, None] + line).clamp(max=side - 1)[:, None, :]
    found = found.flatten(1).gather(1, (place_y * side + place_x).flatten(1)).view_as(grids)
    inside = (line[None, :, None] < height[:, None, None]) & (line[None, None, :] < width[:, None, None])
    return torch.where(inside, found, OUTSIDE)  # of an empty shape: one cell of what surrounds it


def touching(mask: Tensor) -> Tensor:
    """Which cells have one of their eight neighbours in a mask, bool [..., S, S]."""
    cells = mask.float().flatten(0, -3)[:, None]
    around = F.avg_pool2d(cells, 3, stride=1, padding=1, divisor_override=1) - cells
    return (around[:, 0] > 0.5).view(mask.shape)


def _merged(grids: Tensor, steps: Tensor) -> Tensor:
    one, other = (grids == steps[:, column, None, None] for column in (FIRST, SECOND))
    near = (one & touching(other)) | (other & touching(one))
    return torch.where(near, steps[:, THIRD, None, None], grids)
