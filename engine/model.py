"""seq-JEPA (arXiv 2505.03176): encoder, action embedding, aggregator, predictor, and a source of targets.

Letters: B batch, M observed views, V = M + 1, C x H x W image, A action, D encoder features, P action embedding,
T = D + P token width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqjepa.engine.config import ModelConfig, TargetConfig
from seqjepa.engine.encoders import build_encoder
from seqjepa.engine.targets import build_target, encode

__all__ = ["ActionEmbedding", "Aggregator", "Output", "Predictor", "SeqJEPA", "build_model"]


class Output(NamedTuple):
    """What a forward pass yields."""

    z: Tensor  # [B, M, D] encoder features of the observed views
    agg: Tensor  # [B, T] aggregate of the sequence
    prediction: Tensor  # [B, D] of the target view's features
    target: Tensor  # [B, D]


class ActionEmbedding(nn.Module):
    """Linear map of actions, then batch norm without gain: [N, A] -> [N, P].

    Each action passes once, and only real ones do: the reference normalises twice a step, and counts rows
    that it then overwrites with zeros (defect D19).
    """

    def __init__(self, action_dim: int, width: int):
        super().__init__()
        self.linear = nn.Linear(action_dim, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, actions: Tensor) -> Tensor:
        return self.norm(self.linear(actions))


class Aggregator(nn.Module):
    """Transformer over the views with a learnt AGG token in front: tokens [B, M, T] -> [B, T].

    Post-norm layers with ReLU, and a last LayerNorm. Each layer has its own initial weights (the reference
    copies one, defect D27). `time_embedding` adds a learnt embedding of the place; without it, order shows only
    in the actions.
    """

    MAX_VIEWS = 16

    def __init__(self, width: int, num_layers: int, num_heads: int, dropout: float, time_embedding: bool = False):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.time = nn.Parameter(torch.empty(self.MAX_VIEWS, width).normal_(std=0.02)) if time_embedding else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, activation="relu", batch_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.time is not None:
            tokens = tokens + self.time[: tokens.shape[1]]
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)  # [B, 1+M, T]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, 0])


class Predictor(nn.Module):
    """Two-layer MLP with batch norm: aggregate and last action, [B, T + P] -> [B, D]."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, outputs),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class SeqJEPA(nn.Module):
    """Predicts the features of a view from earlier views and the actions between them.

    Args:
        encoder: images [N, C, H, W] -> features [N, D].
        action_embedding: actions [N, A] -> [N, P].
        aggregator: tokens [B, M, D + P] -> [B, D + P].
        predictor: [B, D + P + P] -> [B, D].
        target: (encoder, views) -> features of the observed views [B, M, D] and of the target view [B, D].
        num_features: D.
        token_width: T = D + P.
    """

    def __init__(
        self,
        encoder: nn.Module,
        action_embedding: nn.Module,
        aggregator: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        *,
        num_features: int,
        token_width: int,
    ):
        super().__init__()
        self.num_features = num_features
        self.token_width = token_width
        self.encoder = encoder
        self.action_embedding = action_embedding
        self.aggregator = aggregator
        self.predictor = predictor
        self.target = target

    def forward(self, views: Tensor, actions: Tensor) -> Output:
        """Encode, aggregate, predict.

        Args:
            views: [B, V, C, H, W]; the last is the target.
            actions: [B, V - 1, A]; action i carries view i to view i + 1.
        """
        z, target = self.target(self.encoder, views)  # [B, M, D], [B, D]
        embedded = self.embed(actions)  # [B, M, P]
        agg = self.aggregate(z, embedded[:, :-1])
        prediction = self.predictor(torch.cat([agg, embedded[:, -1].to(agg.dtype)], dim=-1))
        return Output(z, agg, prediction, target)

    def encode(self, views: Tensor) -> Tensor:
        """Features [B, N, D] of views [B, N, C, H, W]."""
        return encode(self.encoder, views)

    def embed(self, actions: Tensor) -> Tensor:
        """Embedded actions [B, N, P] of actions [B, N, A]; in training, normalised over all of them."""
        return self.action_embedding(actions.flatten(0, 1)).unflatten(0, actions.shape[:2])

    def aggregate(self, z: Tensor, embedded: Tensor) -> Tensor:
        """Aggregate [B, T] of the features of any number of views and the embedded actions between them.

        Args:
            z: [B, N, D].
            embedded: [B, N - 1, P]; the last view's token carries none: where it leads is the predictor's question.
        """
        none = z.new_zeros(len(z), 1, self.token_width - self.num_features)
        carried = torch.cat([embedded.to(z.dtype), none], dim=1)
        return self.aggregator(torch.cat([z, carried], dim=-1))


def build_model(config: ModelConfig, target: TargetConfig, action_dim: int) -> SeqJEPA:
    """The network that the config describes, for actions of `action_dim` numbers."""
    encoder, features = build_encoder(config)
    token = features + config.action_dim
    return SeqJEPA(
        encoder,
        ActionEmbedding(action_dim, config.action_dim),
        Aggregator(token, config.num_layers, config.num_heads, config.dropout, config.time_embedding),
        Predictor(token + config.action_dim, config.predictor_hidden, features),
        build_target(target, encoder),
        num_features=features,
        token_width=token,
    )
