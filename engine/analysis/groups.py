"""Moves that are read from the subspaces of the factors, with nothing fitted."""

import math

import torch
from torch import Tensor

from ..models.subspaces import Coordinates, GroupSubspaces, turned
from .accumulators import r2_score


class GroupReadings:
    """Collects moves that the subspaces of a network tell, and the true ones; `r2` compares them.

    Args:
        split: the subspaces.
        extent: variance of a subspace relative to that of the rest, for which it was trained; it says how far along a
            line a move leads.
    """

    def __init__(self, split: GroupSubspaces, extent: float):
        self.split, self.extent = split, extent
        self.read: list[Coordinates] = []
        self.true: dict[str, list[Tensor]] = {name: [] for name in split.dims}

    def update(self, coordinates: Coordinates, actions: Tensor) -> None:
        """Add a batch; actions [B, V - 1, A] are those that truly led from view to view."""
        self.read.append(coordinates)
        moves = self.split.moves(actions[:, : coordinates.lines.shape[1] - 1])
        for name, values in self.split.by_factor(moves).items():
            self.true[name].append(values)

    def r2(self) -> dict[str, float]:
        """R² of each factor's moves; NaN if there were none. 1 if read exactly, 0 for their mean, and else below."""
        if not self.read:
            return dict.fromkeys(self.true, math.nan)
        rest = torch.cat([part.rest.flatten(0, 1) for part in self.read])
        scale = (2 * self.extent * rest.var(0, correction=0).sum()).sqrt()
        found: dict[str, list[Tensor]] = {name: [] for name in self.true}
        for part in self.read:
            moves = part.moves._replace(turns=turned(part.circles), shifts=part.lines.diff(dim=1) / scale)
            for name, values in self.split.by_factor(moves).items():
                found[name].append(values)
        return {name: r2_score(torch.cat(found[name]), torch.cat(true)) for name, true in self.true.items()}
