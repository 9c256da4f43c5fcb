"""Objects of grids: connected cells of one colour, as a fixed number of slots, for whole batches on the device."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .moves import NUM_COLOURS, OUTSIDE, sizes

SIDE = 14  # that heights and widths are divided by
SAMPLES = 5  # rows and columns at which the shape of an object is sampled
FEATURES = {"rich": 10 + NUM_COLOURS + SAMPLES**2 + 2, "legacy": 13 + NUM_COLOURS}


class Objects(NamedTuple):
    """The largest objects of N grids, in O slots; slots without one are zero."""

    features: Tensor  # float32 [N, O, F]
    present: Tensor  # bool [N, O]
    adjacent: Tensor  # bool [N, O, O]: the boxes of two objects meet, or overlap
    slots: Tensor  # int64 [N, S, S]: the slot of each cell, O if it is in none


def components(grids: Tensor, connectivity: Literal[4, 8] = 4, rounds: int | None = None) -> Tensor:
    """Number of the first cell, row by row, of the connected component of one colour that each cell belongs to.

    The smallest number is spread along the runs of one colour in rows and columns, in turn.

    Args:
        grids: int64 [N, S, S].
        connectivity: neighbours of a cell: 4, or 8 with those at its corners.
        rounds: number of rounds; None: until nothing changes, for which the host waits.

    Returns:
        int64 [N, S, S].
    """
    number, side, _ = grids.shape
    labels = torch.arange(side * side, device=grids.device).view(1, side, side).repeat(number, 1, 1)
    rows = torch.arange(number, device=grids.device)
    runs = [_runs(grids, dim) for dim in (2, 1)]
    current, colours = labels, grids
    done = 0
    while rounds is None or done < rounds:
        before, done = current, done + 1
        for run, dim in zip(runs, (2, 1), strict=True):
            least = torch.full_like(current, side * side).scatter_reduce_(dim, run, current, "amin")
            current = least.gather(dim, run)
        if connectivity == 8:
            current = _across_corners(current, colours)
        if rounds is None:
            moved = (current != before).flatten(1).any(1)
            labels[rows] = current
            if not moved.any():
                break
            rows, current, colours = rows[moved], current[moved], colours[moved]
            runs = [run[moved] for run in runs]
    return labels if rounds is None else current


def _runs(grids: Tensor, dim: int) -> Tensor:
    """Number of the run of one colour that each cell belongs to, within its row or column."""
    changes = (grids.diff(dim=dim) != 0).long().cumsum(dim)
    return F.pad(changes, (1, 0) if dim == 2 else (0, 0, 1, 0))


def _across_corners(labels: Tensor, grids: Tensor) -> Tensor:
    """The smallest label of each cell and of those of its colour at its corners."""
    side, found = grids.shape[-1], labels
    padded = F.pad(labels, (1, 1, 1, 1), value=side * side)
    colours = F.pad(grids, (1, 1, 1, 1), value=-1)
    for dy in (0, 2):
        for dx in (0, 2):
            near = (..., slice(dy, dy + side), slice(dx, dx + side))
            found = torch.where((colours[near] == grids) & (padded[near] < found), padded[near], found)
    return found


def find_objects(
    grids: Tensor,
    slots: int = 16,
    features: Literal["rich", "legacy"] = "rich",
    connectivity: Literal[4, 8] = 4,
    rounds: int | None = None,
) -> Objects:
    """The objects of grids, largest first, and of equally large ones the one whose first cell comes first.

    Colour 0 is the background. The features of an object are as follows, in a grid of h x w cells:

    - rich, 47: the square root of its number of cells over h w; its edges to other cells over h w; height and width of
      its box, the centre of its cells, and top, left, bottom and right of its box, over h and w; its colour, one of
      ten; whether it covers each of 5 x 5 places of its box; h and w over 14
    - legacy, 23: number of cells, edges, height and width as above; width over height; 1; its colour as a number;
      centre and box as above; the number of cells again; nine zeros

    Args:
        grids: int64 [N, S, S], colours 0 to 9, 10 outside.
        slots: number O of objects.
        features: which features; there are 47 rich ones, and 23 legacy ones.
        connectivity: neighbours of a cell, 4 or 8.
        rounds: as for `components`.
    """
    number, side, _ = grids.shape
    labels = components(grids, connectivity, rounds).flatten(1)  # [N, S S]
    cells, device = side * side, grids.device
    line = torch.arange(cells, device=device)
    flat = grids.flatten(1)
    coloured = (flat != 0) & (flat != OUTSIDE)
    area = torch.zeros_like(labels).scatter_add_(1, labels, coloured.long())  # at the first cell of each
    key = area * (cells + 1) + (cells - line)
    chosen = torch.where(area > 0, key, -1).topk(min(slots, cells), 1)
    missing = max(0, slots - cells)
    first, there = F.pad(chosen.indices, (0, missing)), F.pad(chosen.values, (0, missing), value=-1) >= 0  # [N, O]
    slot_of = torch.full_like(labels, slots)
    order = torch.arange(first.shape[1], device=device).expand_as(first)
    slot_of = F.pad(slot_of, (0, 1), value=slots)  # one more place, for slots without an object
    slot_of.scatter_(1, torch.where(there, first, cells), torch.where(there, order, slots))
    slot = torch.where(coloured, slot_of.gather(1, labels), slots)  # [N, S S]

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(number, slots + 1).scatter_add_(1, slot, values)[:, :slots]

    def extreme(values: Tensor, kind: Literal["amin", "amax"]) -> Tensor:
        start = cells if kind == "amin" else -1
        found = values.new_full((number, slots + 1), start).scatter_reduce_(1, slot, values, kind)
        return found[:, :slots]

    y, x = (line // side).expand(number, -1), (line % side).expand(number, -1)
    height, width = (size[:, None].float() for size in sizes(grids))
    count = summed(coloured.long()).float()
    top, bottom, left, right = (extreme(v, k) for v in (y, x) for k in ("amin", "amax"))
    edges = summed(_edges(labels.view(number, side, side)).flatten(1)).float()
    safe = count.clamp(min=1)
    centre_y, centre_x = summed(y).float() / safe, summed(x).float() / safe
    tall, wide = (bottom - top + 1).float(), (right - left + 1).float()
    colour = flat.gather(1, first)
    area_share = count / (height * width)
    box = [top / height, left / width, bottom / height, right / width]
    common = [edges / (height * width), tall / height, wide / width]
    centre = [centre_y / height, centre_x / width]
    if features == "rich":
        columns = [area_share.sqrt(), *common, *centre, *box]
        sides = [height.expand(-1, slots) / SIDE, width.expand(-1, slots) / SIDE]
        shape = _sampled(slot, top, left, tall, wide, side)
        parts = [torch.stack(columns, -1), F.one_hot(colour.clamp(max=9), NUM_COLOURS), shape, torch.stack(sides, -1)]
    else:
        columns = [area_share, *common, wide / tall, torch.ones_like(count), colour.float(), *centre, *box, area_share]
        parts = [torch.stack(columns, -1), count.new_zeros(number, slots, NUM_COLOURS - 1)]
    found = torch.cat([part.float() for part in parts], -1)
    apart_y = (bottom[:, :, None] + 1 < top[:, None]) | (bottom[:, None] + 1 < top[:, :, None])
    apart_x = (right[:, :, None] + 1 < left[:, None]) | (right[:, None] + 1 < left[:, :, None])
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(slots, dtype=torch.bool, device=device)
    adjacent = pairs & ~apart_y & ~apart_x
    return Objects(torch.where(there[..., None], found, 0.0), there, adjacent, slot.view_as(grids))


def shape_keys(objects: Objects) -> Tensor:
    """A number for the shape of each object, int64 [N, O], 0 in empty slots.

    It is the same for objects of the same cells but for their place, and else hardly ever.
    """
    slot = objects.slots.flatten(1)
    number, side = len(slot), objects.slots.shape[-1]
    line = torch.arange(side * side, device=slot.device)
    offsets = []
    for place in (line // side, line % side):
        least = slot.new_full((number, objects.present.shape[1] + 1), side)
        offsets.append(place - least.scatter_reduce_(1, slot, place.expand_as(slot), "amin").gather(1, slot))
    drawn = torch.randint(2**62, (side * side,), generator=torch.Generator().manual_seed(0)).to(slot.device)
    cell = drawn[offsets[0] * side + offsets[1]]  # sums of such numbers may pass the largest, and go on from the least
    return torch.zeros_like(least).scatter_add_(1, slot, cell)[:, :-1]


def _edges(labels: Tensor) -> Tensor:
    """Number of the four edges of each cell on whose other side is another component, or nothing."""
    found = torch.full_like(labels, 4)
    for dim in (1, 2):
        same = (labels.diff(dim=dim) == 0).long()
        for pad in ((1, 0), (0, 1)):
            found -= F.pad(same, pad if dim == 2 else (0, 0, *pad))
    return found


def _sampled(slot: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, side: int) -> Tensor:
    """Whether the object of each slot covers the middles of the 5 x 5 parts of its box, bool [N, O, 25]."""
    middle = (torch.arange(SAMPLES, device=slot.device) + 0.5) / SAMPLES
    y = (top[..., None] + (middle * tall[..., None]).floor().long()).clamp(0, side - 1)
    x = (left[..., None] + (middle * wide[..., None]).floor().long()).clamp(0, side - 1)
    place = (y[..., :, None] * side + x[..., None, :]).flatten(1)
    number = torch.arange(top.shape[1], device=slot.device)[:, None]
    return slot.gather(1, place).view(*top.shape, -1) == number
