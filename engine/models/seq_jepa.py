"""seq-JEPA (arXiv 2505.03176): encoder, action embedding, aggregator, predictor, and a source of targets.

Letters: B batch, M observed views, V = M + 1, C x H x W image, A action, D encoder features, P action embedding,
T token width (D + P, or D if the aggregator receives no actions), E width of predictions (D, or the projector's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aggregators import TransformerAggregator
from .config import ModelConfig, TargetConfig
from .encoders import build_encoder
from .targets import Sharpening, build_target, encode

__all__ = ["ActionEmbedding", "Output", "Predictor", "Projector", "Reading", "SeqJEPA", "build_model"]


class Reading(NamedTuple):
    """Output of one reading of the sequence."""

    agg: Tensor  # [B, T] aggregate of the sequence
    prediction: Tensor  # [B, E] of the target
    target: Tensor  # [B, E]


class Output(NamedTuple):
    """Output of a forward pass."""

    z: Tensor  # [B, M, D] encoder features of the observed views
    agg: Tensor  # [B, T] aggregate of the sequence
    prediction: Tensor  # [B, E] of the target
    target: Tensor  # [B, E] of the target view, after projection and sharpening if the model has them
    encoded: Tensor  # [B, N, D] features of all views that it encoded: M, or V if the target is among them
    target_z: Tensor  # [B, n, D] features of the n targets, without gradient; the last view's come first
    projections: Tensor | None = None  # [B, V, E] of all views
    backwards: Reading | None = None  # the reading from the last view to the first

    @property
    def readings(self) -> list[Reading]:
        """The forward reading and, if the sequence was also read backwards, the backward one."""
        forwards = Reading(self.agg, self.prediction, self.target)
        return [forwards] if self.backwards is None else [forwards, self.backwards]

    def float(self) -> Output:
        """The same output in float32."""
        return self.each(lambda x: x.float())

    def first(self, count: int) -> Output:
        """The output of the first `count` sequences."""
        return self.each(lambda x: x[:count])

    def each(self, change: Callable[[Tensor], Tensor]) -> Output:
        """The output with `change` applied to every field."""
        backwards = None if self.backwards is None else Reading(*map(change, self.backwards))
        return Output(*(x if x is None else change(x) for x in self[:-1]), backwards)


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


class Predictor(nn.Module):
    """Two-layer MLP with batch norm: aggregate and last action, [B, T + P] -> predictions [B, E]."""

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


class Projector(nn.Module):
    """Three-layer MLP with batch norm (LeJEPA's head): features [N, D] -> [N, E], of unit length if `unit`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, unit: bool = False):
        super().__init__()
        self.unit = unit
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        projections = self.layers(features)
        return F.normalize(projections, dim=-1) if self.unit else projections


class SeqJEPA(nn.Module):
    """Predicts the features of a view from earlier views and the actions between them.

    Args:
        encoder: images [N, C, H, W] -> features [N, D].
        action_embedding: actions [N, A] -> [N, P]; None if neither aggregator nor predictor receives actions.
        aggregator: tokens [B, M, T] -> [B, T].
        predictor: [B, T + P] -> [B, E], or [B, T] -> [B, E] if it receives no action.
        target: source of the targets.
        projector: features [N, D] -> [N, E]; with it, predictions are compared with projections.
        sharpening: targets [B, N, E] -> distributions.
        num_features: D.
        token_width: T.
        prediction_width: E.
        aggregator_action: whether the aggregator receives the actions between the views.
        predictor_action: whether the predictor receives the action that leads to the target.
    """

    def __init__(
        self,
        encoder: nn.Module,
        action_embedding: nn.Module | None,
        aggregator: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        projector: nn.Module | None = None,
        sharpening: nn.Module | None = None,
        *,
        num_features: int,
        token_width: int,
        prediction_width: int,
        aggregator_action: bool = True,
        predictor_action: bool = True,
    ):
        super().__init__()
        self.num_features = num_features
        self.token_width = token_width
        self.prediction_width = prediction_width
        self.aggregator_action = aggregator_action
        self.predictor_action = predictor_action
        self.encoder = encoder
        self.action_embedding = action_embedding
        self.aggregator = aggregator
        self.predictor = predictor
        self.target = target
        self.projector = projector
        self.sharpening = sharpening

    def forward(self, views: Tensor, actions: Tensor, inverse_actions: Tensor | None = None) -> Output:
        """Encode, aggregate, predict.

        Args:
            views: [B, V, C, H, W]; the last view is the target.
            actions: [B, V - 1, A]; action i takes view i to view i + 1.
            inverse_actions: [B, V - 1, A]; action i takes view i + 1 back to view i. If given, the sequence is also
                read backwards, and view 0 is predicted.
        """
        return self.predict(*self.encode_views(views, both=inverse_actions is not None), actions, inverse_actions)

    def encode_views(self, views: Tensor, *, both: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features of the encoded views and of the targets, for `predict`.

        Returns:
            Encoder features [B, N, D] of all views or of the observed ones, and features of the targets: [B, 1, D] of
            the last view, or with `both` [B, 2, D] of the last view and view 0; None if the former contain them.
        """
        if self.target.joint:
            return self.encode(views), None
        z = self.encode(views if both else views[:, :-1])
        return z, self.target.features(self.encoder, _ends(views, both))

    def predict(
        self, z: Tensor, target_z: Tensor | None, actions: Tensor, inverse_actions: Tensor | None = None
    ) -> Output:
        """Everything after the encoder; takes what `encode_views` returns and the actions of `forward`."""
        num_observed = actions.shape[1]
        both = inverse_actions is not None
        if target_z is None:
            target_z = _ends(z, both)
        projections = None
        targets = target_z
        if self.projector is not None:
            projections = self.projector(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            targets = _ends(projections, both)
        if self.target.detached:
            targets = targets.detach()
        if self.sharpening is not None:
            targets = self.sharpening(targets)
        if not both:
            forwards = self._reading(z[:, :num_observed], self.embed(actions), targets[:, 0])
            backwards = None
        else:  # both directions are normalised together
            embedded = self.embed(torch.cat([actions, inverse_actions.flip(1)]))
            embedded, embedded_back = embedded.chunk(2)
            forwards = self._reading(z[:, :num_observed], embedded, targets[:, 0])
            backwards = self._reading(z[:, 1:].flip(1), embedded_back, targets[:, 1])
        return Output(z[:, :num_observed], *forwards, z, target_z.detach(), projections, backwards)

    def _reading(self, z: Tensor, embedded: Tensor, target: Tensor) -> Reading:
        agg = self.aggregate(z, embedded[:, :-1])
        inputs = torch.cat([agg, embedded[:, -1].to(agg.dtype)], dim=-1) if self.predictor_action else agg
        return Reading(agg, self.predictor(inputs), target)

    def encode(self, views: Tensor) -> Tensor:
        """Features [B, N, D] of views [B, N, C, H, W]."""
        return encode(self.encoder, views)

    def embed(self, actions: Tensor) -> Tensor:
        """Embedded actions [B, N, P] of actions [B, N, A]; in training, normalised over all of them."""
        if self.action_embedding is None:
            return actions
        return self.action_embedding(actions.flatten(0, 1)).unflatten(0, actions.shape[:2])

    def aggregate(self, z: Tensor, embedded: Tensor) -> Tensor:
        """Aggregate [B, T] of the features of any number of views and the embedded actions between them.

        Args:
            z: [B, N, D].
            embedded: [B, N - 1, P]; the last view's token has none, because its action goes to the predictor.
        """
        if not self.aggregator_action:
            return self.aggregator(z)
        none = z.new_zeros(len(z), 1, self.token_width - self.num_features)
        carried = torch.cat([embedded.to(z.dtype), none], dim=1)
        return self.aggregator(torch.cat([z, carried], dim=-1))


def _ends(x: Tensor, both: bool) -> Tensor:
    """The last entry of x [B, N, ...] as [B, 1, ...], or the last and the first as [B, 2, ...]."""
    return torch.stack([x[:, -1], x[:, 0]], dim=1) if both else x[:, -1:]  # a list as index would sync


def build_model(config: ModelConfig, target: TargetConfig, action_dim: int) -> SeqJEPA:
    """Build the network that the config describes, for actions of `action_dim` numbers."""
    encoder, features = build_encoder(config)
    uses_actions = config.aggregator_action or config.predictor_action
    token = features + config.action_dim * config.aggregator_action
    width = config.projector_dim or features  # width of predictions
    unit = config.projector_norm == "unit"
    return SeqJEPA(
        encoder,
        ActionEmbedding(action_dim, config.action_dim) if uses_actions else None,
        TransformerAggregator(token, config.num_layers, config.num_heads, config.dropout, config.time_embedding),
        Predictor(token + config.action_dim * config.predictor_action, config.predictor_hidden, width),
        build_target(target, encoder),
        Projector(features, config.projector_hidden, width, unit) if config.projector_dim else None,
        Sharpening(width, target.temperature, target.center_momentum) if target.sharpening else None,
        num_features=features,
        token_width=token,
        prediction_width=width,
        aggregator_action=config.aggregator_action,
        predictor_action=config.predictor_action,
    )
