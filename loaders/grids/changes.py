"""Changes of the grids on which programs begin."""

import torch
from torch import Tensor

from ...kernels.philox import philox
from ..config import ChangesConfig
from ..draws import chance
from .moves import COLUMNS, DX, DY, MOVE, NUM_COLOURS, OUTSIDE, TURNS, Move, apply
from .objects import components

LOST, BLANK, NOISY, NOISE, COLOURS, SYMMETRY, SHIFT = range(7)  # what words are drawn for


def changed(grids: Tensor, key: Tensor, config: ChangesConfig) -> Tensor:
    """Grids that have lost objects and cells, and were recoloured, turned, mirrored and shifted, as the section says.

    Args:
        grids: int64 [B, S, S].
        key: two random words for each grid, int64 [B, 2].
        config: which changes, and how likely they are.

    Returns:
        int64 [B, S, S].
    """
    cells = grids.shape[1:].numel()  # a process may have no grids

    def drawn(purpose: int, number: int) -> Tensor:
        block = torch.arange((number + 3) // 4, device=key.device)
        lanes = philox((key[:, :1], key[:, 1:]), (block, purpose, 0, 1))  # programs end with 0
        return torch.stack(lanes, -1).flatten(1)[:, :number]

    inside = grids != OUTSIDE
    if config.lost:
        lost = chance(drawn(LOST, cells), config.lost).bool()
        object_of = components(grids).flatten(1)
        grids = torch.where(lost.gather(1, object_of).view_as(grids) & inside, 0, grids)
    if config.blank:
        grids = torch.where(chance(drawn(BLANK, cells), config.blank).bool().view_as(grids) & inside, 0, grids)
    if config.noise:
        noisy = chance(drawn(NOISY, cells), config.noise).bool().view_as(grids)
        colour = (drawn(NOISE, cells) * NUM_COLOURS >> 32).view_as(grids)
        grids = torch.where(noisy & inside, colour, grids)
    if config.colours:
        order = 1 + drawn(COLOURS, NUM_COLOURS - 1).argsort(dim=1, stable=True)
        table = torch.cat([torch.zeros_like(order[:, :1]), order, torch.full_like(order[:, :1], OUTSIDE)], 1)
        grids = table.gather(1, grids.flatten(1)).view_as(grids)
    if config.symmetries:
        which = drawn(SYMMETRY, 1)[:, 0] >> 29  # 0 to 7
        grids = apply(grids, _steps({MOVE: torch.full_like(which, Move.ROTATE), TURNS: which % 4}))
        mirrored = apply(grids, _steps({MOVE: torch.full_like(which, Move.MIRROR_X)}))
        grids = torch.where((which >= 4)[:, None, None], mirrored, grids)
    if config.shift:
        by = (drawn(SHIFT, 2) * (2 * config.shift + 1) >> 32) - config.shift
        grids = apply(grids, _steps({MOVE: torch.full_like(by[:, 0], Move.TRANSLATE), DX: by[:, 0], DY: by[:, 1]}))
    return grids


def _steps(columns: dict[int, Tensor]) -> Tensor:
    """Steps [B, 10] with these columns, and 0 in the others."""
    (first, *_) = columns.values()
    steps = first.new_zeros(len(first), len(COLUMNS))
    for column, values in columns.items():
        steps[:, column] = values
    return steps
