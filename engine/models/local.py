"""Learning block by block: every block of the encoder has a head of its own, and no gradient passes between blocks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .config import BlocksConfig, EncoderConfig
from .encoders.base import ImageEncoder
from .seq_jepa import Output, Reading


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
    """

    def __init__(self, config: BlocksConfig, encoder: EncoderConfig, action_dim: int):
        super().__init__()
        widths = encoder.block_widths
        self.reach = len(widths) if config.reach == "all" else config.reach
        self.first_head = len(widths) - 1 if config.heads == "last" else 0
        self.first = max(0, self.first_head - self.reach + 1)
        self.heads = nn.ModuleList(BlockHead(config, width, action_dim) for width in widths[self.first_head :])

    def outputs(self, encoder: ImageEncoder, views: Tensor, actions: Tensor) -> Iterator[Output]:
        """The output of each head, from the first block to the last.

        A block runs only when its output is asked for. If the backward pass of each is done before, only what one head
        reaches is kept at a time.

        Args:
            encoder: an encoder with blocks.
            views: [B, V, C, H, W].
            actions: [B, V - 1, A].
        """
        maps = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        blocks = encoder.blocks()
        with torch.no_grad():
            for block in blocks[: self.first]:
                maps = block(maps)
        inputs = {self.first: maps}  # of each block that a later head reaches, without gradient
        for number, head in enumerate(self.heads, start=self.first_head):
            start = max(self.first, number - self.reach + 1)
            found = inputs[start]
            for reached in range(start, number + 1):
                again = reached + 1 in inputs
                with _statistics_kept(blocks[reached]) if again else contextlib.nullcontext():
                    found = blocks[reached](found)
                inputs.setdefault(reached + 1, found.detach())
            inputs = {block: x for block, x in inputs.items() if block > number + 1 - self.reach}
            yield head(encoder.pooled(found).unflatten(0, views.shape[:2]), actions)


@contextlib.contextmanager
def _statistics_kept(block: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Leave the running statistics of batch norms alone: they have seen this batch."""
    assert isinstance(block, nn.Module)
    norms = [part for part in block.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    layers = nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
