"""The encoder as it was when the last task of a stream ended."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...loaders.batch import Views
from .config import EncoderMemoryConfig


class Recalled(NamedTuple):
    """Features of today, mapped to those of the past, beside the features of the past."""

    mapped: Tensor  # [B, N, D]
    past: Tensor  # [B, N, D], without gradient
    known: Tensor  # [B]: 1 if a task has ended, 0 before


class EncoderMemory(nn.Module):
    """A frozen copy of the encoder, and a linear map from present features to its features.

    The map lets features change as long as the past ones can be read from them. It starts each task as the identity.
    Source: CaSSLe (arXiv 2112.04215) and PFR (arXiv 2112.08913), whose maps are MLPs.
    """

    known: Tensor

    def __init__(self, config: EncoderMemoryConfig, encoder: nn.Module, features: int):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.map = nn.Linear(features, features)
        self._start_map()
        self.register_buffer("known", torch.zeros(()))

    def train(self, mode: bool = True) -> "EncoderMemory":
        """The copy keeps its batch-norm statistics: it stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, views: Views) -> Tensor:
        """Features of the past [B, N, D]."""
        return self.encoder(views)

    def forward(self, z: Tensor, past: Tensor) -> Recalled:
        """What is compared, for present and past features [B, N, D] of the same views."""
        return Recalled(self.map(z), past, self.known.expand(len(z)))

    @torch.no_grad()
    def take(self, encoder: nn.Module) -> None:
        """Keep the encoder as it is now, in place; the map is the identity again, because both are equal now."""
        present = encoder.state_dict()
        for name, kept in self.encoder.state_dict().items():
            kept.copy_(present[name])
        self.known.fill_(1)
        self._start_map()

    def _start_map(self) -> None:
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)
