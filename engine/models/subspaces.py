"""Parts of z in which a group acts: a plane that an angle turns, a direction along which a number shifts.

Letters: B batch, N views, D features of z, C circles, L lines, A action.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...loaders.sequences import ActionSpace
from .config import GroupSubspacesConfig


class Moves(NamedTuple):
    """Moves between successive views, as groups have them."""

    turns: Tensor  # [B, N - 1, C, 2], sine and cosine of the angle
    shifts: Tensor  # [B, N - 1, L], over the standard deviation of all moves


class Coordinates(NamedTuple):
    """z, split into the subspaces of groups and the rest."""

    circles: Tensor  # [B, N, C, 2], coordinates in the plane of each circle
    lines: Tensor  # [B, N, L], coordinates along the direction of each line
    rest: Tensor  # [B, N, D], z without its components in these subspaces
    moves: Moves  # what the network was told


class GroupSubspaces(nn.Module):
    """Splits z into a plane for each circle, a direction for each line, all orthogonal, and the rest.

    A group element acts on the plane as the rotation R(angle) and on the direction as a translation, so that
    ρ(g) ρ(h) = ρ(g h) holds by construction, and on the rest as the identity. Where the subspaces lie, and the circles'
    centres, is learnt.

    Attributes:
        circles, lines: names of the factors, in the order of the coordinates; one of several lines occurs as often.
        dims: how many numbers `by_factor` gives for each factor.
    """

    no_decay = ("basis", "centre")

    offset: Tensor
    scale: Tensor
    deviation: Tensor
    turn_dims: Tensor
    shift_dims: Tensor

    def __init__(self, config: GroupSubspacesConfig, features: int, actions: ActionSpace):
        super().__init__()
        assert actions.offset is not None
        assert actions.scale is not None
        assert actions.deviation is not None
        turning = [group for group in actions.groups if group.kind == "circle"]
        shifting = [group for group in actions.groups if group.kind == "line"]
        dims = list(range(actions.dim))
        self.circles = [group.factor for group in turning]
        self.lines = [group.factor for group in shifting for _ in dims[group.dims]]
        self.dims = {group.factor: len(dims[group.dims]) for group in (*turning, *shifting)}
        self.basis = nn.Parameter(torch.randn(features, 2 * len(self.circles) + len(self.lines)))  # spans them
        self.centre = nn.Parameter(torch.zeros(len(self.circles), 2))
        for name in ("offset", "scale", "deviation"):
            self.register_buffer(name, getattr(actions, name).clone())
        # as tensors: a list as index would be copied to the device in each step
        for name, groups in (("turn_dims", turning), ("shift_dims", shifting)):
            chosen = torch.tensor([dim for group in groups for dim in dims[group.dims]], dtype=torch.long)
            self.register_buffer(name, chosen, persistent=False)

    def moves(self, actions: Tensor) -> Moves:
        """The moves that actions [B, N - 1, A] encode."""
        moves = actions * self.scale + self.offset
        turns = moves[..., self.turn_dims].unflatten(-1, (len(self.circles), 2))
        return Moves(turns, (moves / self.deviation)[..., self.shift_dims])

    def by_factor(self, moves: Moves) -> dict[str, Tensor]:
        """Moves [B * (N - 1), k] of each factor, by its name: two numbers for a circle, one for each line."""
        found = {name: moves.turns[:, :, number].flatten(0, 1) for number, name in enumerate(self.circles)}
        for name in dict.fromkeys(self.lines):
            columns = [number for number, line in enumerate(self.lines) if line == name]
            found[name] = torch.stack([moves.shifts[..., number].flatten() for number in columns], dim=1)
        return found

    def forward(self, z: Tensor, actions: Tensor) -> Coordinates:
        """Split z [B, N, D], in float32; actions [B, N - 1, A] lead from view to view."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            basis = orthonormal(self.basis)
            inside = z @ basis
            rest = z - inside @ basis.mT
            circles, lines = inside.split([2 * len(self.circles), len(self.lines)], dim=-1)
            circles = circles.unflatten(-1, (len(self.circles), 2)) - self.centre
            return Coordinates(circles, lines, rest, self.moves(actions))


def orthonormal(basis: Tensor) -> Tensor:
    """Orthonormal columns that span what the columns of `basis` [D, K] span, by Gram and Schmidt.

    A QR factorisation of LAPACK's kind gives the same up to signs, which jump while the basis moves.
    """
    columns: list[Tensor] = []
    for column in basis.unbind(1):
        for _ in range(2):  # once leaves errors of the size of the condition number
            for earlier in columns:
                column = column - (earlier @ column) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def turned(points: Tensor) -> Tensor:
    """Sine and cosine [B, N - 1, C, 2] of the angle from each point [B, N, C, 2] to the next, seen from the centre."""
    units = nn.functional.normalize(points, dim=-1)
    first, second = units[:, :-1], units[:, 1:]
    sine = first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
    return torch.stack([sine, (first * second).sum(-1)], dim=-1)
