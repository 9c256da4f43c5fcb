"""Learning block by block: every block of the encoder has a head of its own, and no gradient passes between blocks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import BlocksConfig
from .encoders.base import ImageEncoder
from .encoders.config import EncoderConfig
from .seq_jepa import Output, Reading

T = TypeVar("T")


class BlockHead(nn.Module):
    """Projects the pooled maps of a block, and predicts the projection of each view from that of the view before it.

    Args:
        config: widths of its layers.
        width: number of the block's channels.
        action_dim: number of dimensions of an action.
    """

    def __init__(self, config: BlocksConfig, width: int, action_dim: int):
        super().__init__()
        self.projector = _mlp(width, config.head_hidden, config.head_dim)
        self.predictor = _mlp(config.head_dim + action_dim, config.head_hidden, config.head_dim)

    def forward(self, features: Tensor, actions: Tensor) -> Output:
        """What the terms of the objective read: each pair of successive views is a reading; targets have gradients.

        Args:
            features: pooled maps [B, V, C].
            actions: [B, V - 1, A].
        """
        shape = features.shape[:2]
        projections = self.projector(features.flatten(0, 1)).unflatten(0, shape)
        given = torch.cat([projections[:, :-1], actions.to(projections.dtype)], dim=-1)
        predicted = self.predictor(given.flatten(0, 1)).unflatten(0, given.shape[:2])
        first, *others = (
            Reading(features[:, view], predicted[:, view], projections[:, view + 1]) for view in range(shape[1] - 1)
        )
        last = features[:, -1:].detach()
        return Output(features[:, :-1], *first, features, last, projections, tuple(others))


class Unit(nn.Module):
    """A head and the blocks that its gradient reaches: what learns by itself, and may be compiled by itself.

    Args:
        encoder: that pools the maps.
        blocks: those that the gradient reaches, in order.
        start: number of the first of them.
        head: reads the maps of the last.
        seen: number of the first ones that have seen the batch already, for the head before.
    """

    def __init__(self, encoder: ImageEncoder, blocks: Sequence[nn.Module], start: int, head: nn.Module, seen: int):
        super().__init__()
        self.pooled, self.start = encoder.pooled, start
        self.blocks, self.head = nn.ModuleList(blocks), head
        self.norms = [part for block in blocks[:seen] for part in block.modules() if isinstance(part, _BatchNorm)]

    def forward(self, maps: Tensor, actions: Tensor) -> tuple[Output, Tensor]:
        """What the terms of the objective read, and the maps of the last block, without gradient.

        Args:
            maps: of the block before the first, [B * V, C, h, w].
            actions: [B, V - 1, A].
        """
        for block in self.blocks:
            maps = block(maps)
        return self.head(self.pooled(maps).unflatten(0, (len(actions), -1)), actions), maps.detach()

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Leave the running statistics of blocks alone that have seen the batch already."""
        momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(self.norms, momenta, strict=True):
                norm.momentum = momentum


class LocalBlocks(nn.Module):
    """The heads of an encoder's blocks.

    Where the gradient of a head reaches further than its own block, the blocks before are computed once more for it.
    Source: the local rule of LPL (Halvagal and Zenke 2023), with an action between the views; overlapping pairs are
    LoCo's (arXiv 2008.01342).

    Args:
        config: settings of the heads.
        encoder: config of the encoder, which has blocks.
        action_dim: number of dimensions of an action.

    Attributes:
        first: number of the first block that learns.
        turn: number of the head that learns; None if all do.
    """

    turn: int | None = None

    def __init__(self, config: BlocksConfig, encoder: EncoderConfig, action_dim: int):
        super().__init__()
        widths = encoder.block_widths
        self.reach = len(widths) if config.reach == "all" else config.reach
        self.in_turn = config.order == "in_turn"
        self.first_head = len(widths) - 1 if config.heads == "last" else 0
        self.first = max(0, self.first_head - self.reach + 1)
        self.heads = nn.ModuleList(BlockHead(config, width, action_dim) for width in widths[self.first_head :])

    def units(self, encoder: ImageEncoder) -> list[Unit]:
        """Each head with the blocks that it reaches."""
        blocks, found = encoder.blocks(), []
        for number, head in enumerate(self.heads, start=self.first_head):
            start = max(self.first, number - self.reach + 1)
            reached = blocks[start : number + 1]
            found.append(Unit(encoder, reached, start, head, len(reached) - 1 if found else 0))
        return found

    def begin(self, step: int, total: int) -> bool:
        """Give the turn to the head that learns in a step of `total`; returns whether it is another one than before."""
        turn = step * len(self.heads) // total if self.in_turn else None
        changed, self.turn = turn != self.turn, turn
        return changed

    def span(self, step: int, total: int) -> tuple[int, int]:
        """The first step of the turn that a step of `total` is in, and the number of its steps."""
        if not self.in_turn:
            return 0, total
        turn, heads = step * len(self.heads) // total, len(self.heads)
        first, last = (-(-number * total // heads) for number in (turn, turn + 1))
        return first, last - first

    def ended(self, units: Sequence[Unit]) -> set[nn.Parameter]:
        """The parameters that no head reaches whose turn is yet to end."""
        turn = self.turn or 0
        return {p for unit in units[:turn] for p in unit.parameters()} - {
            p for unit in units[turn:] for p in unit.parameters()
        }

    def run(
        self,
        encoder: ImageEncoder,
        units: Sequence[Unit],
        views: Tensor,
        actions: Tensor,
        call: Callable[[Unit, Tensor, Tensor], tuple[T, Tensor]] = Unit.__call__,
    ) -> Iterator[T]:
        """What `call` returns of each unit besides the maps, from the first to the last.

        It is without gradient if another one has the turn. A unit runs only when it is asked for. If the backward pass
        of each is done before, only what one head reaches is kept at a time.

        Args:
            encoder: an encoder with blocks.
            units: its units.
            views: [B, V, C, H, W].
            actions: [B, V - 1, A].
            call: calls a unit, by default for its output.
        """
        maps = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        if self.first:
            with torch.no_grad():
                for block in encoder.blocks()[: self.first]:
                    maps = block(maps)
        inputs = {self.first: maps}  # of each block that a later head reaches, without gradient
        for number, unit in enumerate(units):
            learns = torch.is_grad_enabled() and self.turn in (None, number)
            with torch.set_grad_enabled(learns), unit.statistics_kept():
                found, maps = call(unit, inputs[unit.start], actions)
            inputs[self.first_head + number + 1] = maps
            needed = {later.start for later in units[number + 1 :]}
            inputs = {block: x for block, x in inputs.items() if block in needed}
            yield found
            del found


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    layers = nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
