"""seq-JEPA (arXiv 2505.03176): encoder, action embedding, aggregator, predictor, and a source of targets.

Letters: B batch, M observed views, V = M + 1, C x H x W image, A action, D encoder features, P action embedding,
T token width (D + P, or D if the aggregator receives no actions), E width of predictions (D, or the projector's).
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ...loaders.batch import Views, each
from .aggregators.base import Aggregator
from .config import ModelConfig, TargetConfig
from .heads import ActionEmbedding, Sharpening
from .targets.base import Target


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
    encoded: Tensor  # [B, N, D] features of all views that the encoder saw: N is M, or V with the target
    target_z: Tensor  # [B, n, D] features of the n targets, without gradient; the last view's come first
    projections: Tensor | None = None  # [B, V, E] of all views
    backwards: Reading | None = None  # the reading from the last view to the first

    @property
    def readings(self) -> list[Reading]:
        """The forward reading and, if the sequence was also read backwards, the backward one."""
        forwards = Reading(self.agg, self.prediction, self.target)
        return [forwards] if self.backwards is None else [forwards, self.backwards]

    @property
    def projected(self) -> Tensor:
        """The projections in float32, for terms that require a projector."""
        assert self.projections is not None
        return self.projections.float()

    def float(self) -> Self:
        """The same output in float32."""
        return each(self, lambda x: x.float())

    def first(self, count: int) -> Self:
        """The output of the first `count` sequences."""
        return each(self, lambda x: x[:count])


class SeqJEPA(nn.Module):
    """Predicts the features of a view from earlier views and the actions between them.

    Args:
        config: config of the network.
        target: config of the source of the targets.
        action_dim: A.
    """

    def __init__(self, config: ModelConfig, target: TargetConfig, action_dim: int):
        super().__init__()
        self.num_features = config.encoder.num_features  # D
        self.token_width = config.token_width  # T
        self.prediction_width = config.prediction_width  # E
        self.aggregator_action, self.predictor_action = config.aggregator_action, config.predictor_action
        uses_actions = config.aggregator_action or config.predictor_action
        inputs = self.token_width + config.action_dim * config.predictor_action
        self.encoder = config.encoder.build()
        self.action_embedding = ActionEmbedding(action_dim, config.action_dim) if uses_actions else None
        self.aggregator: Aggregator = config.aggregator.build(self.token_width)
        self.predictor = config.predictor.build(inputs, self.prediction_width)
        self.target: Target = target.build(self.encoder)
        self.projector = config.projector.build(self.num_features)
        self.sharpening: Sharpening | None = target.sharpening.build(self.prediction_width)

    def forward(self, views: Views, actions: Tensor, inverse_actions: Tensor | None = None) -> Output:
        """Encode, aggregate, predict.

        Args:
            views: [B, V, ...]; the last view is the target.
            actions: [B, V - 1, A]; action i takes view i to view i + 1.
            inverse_actions: [B, V - 1, A]; action i takes view i + 1 back to view i. If given, the sequence is also
                read backwards, and view 0 is predicted.
        """
        return self.predict(*self.encode_views(views, both=inverse_actions is not None), actions, inverse_actions)

    def encode_views(self, views: Views, *, both: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features of the encoded views and of the targets, for `predict`.

        Returns:
            Encoder features [B, N, D] of all views or of the observed ones, and features of the targets: [B, 1, D] of
            the last view, or with `both` [B, 2, D] of the last view and view 0; None if the former contain them.
        """
        if self.target.joint:
            return self.encoder(views), None
        z = self.encoder(views if both else each(views, lambda x: x[:, :-1]))
        return z, self.target.features(self.encoder, each(views, lambda x: _ends(x, both)))

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
