"""The small parts of the network: neck, embedding of actions, projector of features, inference of actions."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...loaders.batch import Views
from .config import LinearNeckConfig, MLPInverseConfig, MLPProjectorConfig, ModelConfig
from .encoders.base import Tokens


class ActionEmbedding(nn.Module):
    """Linear map of actions, then batch norm without gain: [N, A] -> [N, P].

    Batch statistics are over real actions, each once. The reference code normalises twice per step, and its
    statistics include rows that it then overwrites with zeros.
    """

    def __init__(self, action_dim: int, width: int):
        super().__init__()
        self.linear = nn.Linear(action_dim, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, actions: Tensor) -> Tensor:
        return self.norm(self.linear(actions))


class LinearNeck(nn.Sequential):
    """One layer and a batch norm without gain: features [N, D] -> z [N, D']."""

    def __init__(self, config: LinearNeckConfig, features: int):
        super().__init__(nn.Linear(features, config.dim, bias=False), nn.BatchNorm1d(config.dim, affine=False))


class NeckedEncoder(nn.Module):
    """An encoder with a neck: views [B, N, ...] -> z [B, N, D']."""

    def __init__(self, encoder: nn.Module, neck: nn.Module):
        super().__init__()
        self.encoder, self.neck = encoder, neck

    def forward(self, views: Views) -> Tensor:
        return self._through(self.encoder(views))

    def with_tokens(self, views: Tensor) -> tuple[Tensor, Tokens]:
        """z [B, N, D'] of views, and the tokens of the encoder."""
        encoder: Any = self.encoder
        features, tokens = encoder.with_tokens(views)
        return self._through(features), tokens

    def _through(self, features: Tensor) -> Tensor:
        return self.neck(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def build_encoder(config: ModelConfig) -> Any:
    """The encoder with its neck, if it has one: a module from views [B, N, ...] to features [B, N, D]."""
    encoder = config.encoder.build()
    neck = config.neck.build(config.encoder.num_features)
    return encoder if neck is None else NeckedEncoder(encoder, neck)


class MLPProjector(nn.Module):
    """Three-layer MLP with batch norm (LeJEPA's head): features [N, D] -> [N, E], optionally of unit length."""

    def __init__(self, config: MLPProjectorConfig, inputs: int):
        super().__init__()
        self.unit = config.unit
        layers, hidden = [], config.hidden
        for width in (inputs, hidden):
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, config.dim))

    def forward(self, features: Tensor) -> Tensor:
        projections = self.layers(features)
        return F.normalize(projections, dim=-1) if self.unit else projections


class MLPInverse(nn.Sequential):
    """Two-layer MLP with batch norm: features of two successive views, [N, 2 D] -> the action between them, [N, A]."""

    def __init__(self, config: MLPInverseConfig, features: int, action_dim: int):
        super().__init__(
            nn.Linear(2 * features, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, action_dim),
        )
