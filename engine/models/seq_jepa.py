"""seq-JEPA (arXiv 2505.03176): encoder, action embedding, aggregator, predictor, and a source of targets.

Letters: B batch, M observed views, V = M + 1, C x H x W image, A action, D encoder features, P action embedding,
T token width (D + P, or D if the aggregator receives no actions), E width of predictions (D, or the projector's).
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ...loaders.batch import Views, each
from ...loaders.sequences import ActionSpace
from .aggregators.base import Aggregator
from .config import ModelConfig, Span
from .encoders.base import Tokens
from .heads import ActionEmbedding, build_encoder
from .memory import EncoderMemory, Recalled
from .subspaces import Coordinates
from .targets.base import Target
from .targets.config import TargetConfig
from .targets.sharpening import Sharpening


class Reading(NamedTuple):
    """Output of one reading of the sequence."""

    agg: Tensor  # [B, T] aggregate of the sequence
    prediction: Tensor  # [B, E] of the target
    target: Tensor  # [B, E]


class Altered(NamedTuple):
    """Features [B, N, D] of the encoded views, altered in each way for which there is a term."""

    recoloured: Tensor | None = None
    shifted: Tensor | None = None
    mirrored: Tensor | None = None


class Output(NamedTuple):
    """Output of a forward pass."""

    z: Tensor  # [B, M, D] encoder features of the observed views
    agg: Tensor  # [B, T] aggregate of the sequence
    prediction: Tensor  # [B, E] of the target
    target: Tensor  # [B, E] of the target view, after projection and sharpening if the model has them
    encoded: Tensor  # [B, N, D] features of all views that the encoder saw: N is M, or V with the target
    target_z: Tensor  # [B, n, D] features of the n targets, without gradient; the last view's come first
    projections: Tensor | None = None  # [B, N, E] of all views that the encoder saw
    others: tuple[Reading, ...] = ()  # further readings of the sequence
    inferred_actions: Tensor | None = None  # [B, N - 1, A] from the features of two successive views
    actions: Tensor | None = None  # [B, N - 1, A] what they should be
    coordinates: Coordinates | None = None  # the features of N views in the subspaces of the factors, and the rest
    recalled: Recalled | None = None  # the features of N views beside those of the last task's encoder
    tokens: Tokens | None = None  # [B, N, ...] of the parts of N views
    altered: Altered | None = None

    @property
    def readings(self) -> list[Reading]:
        """All readings of the sequence; the first is the one whose fields the output itself has."""
        return [Reading(self.agg, self.prediction, self.target), *self.others]

    @property
    def projected(self) -> Tensor:
        """The projections in float32, for terms that require a projector."""
        assert self.projections is not None
        return self.projections.float()

    def float(self) -> Self:
        """The same output in float32, but for what are no numbers with a fraction."""
        return each(self, lambda x: x.float() if x.is_floating_point() else x)

    def first(self, count: int) -> Self:
        """The output of the first `count` sequences."""
        return each(self, lambda x: x[:count])


class SeqJEPA(nn.Module):
    """Predicts the features of a view from earlier views and the actions between them.

    Args:
        config: config of the network.
        target: config of the source of the targets.
        actions: what actions are.
    """

    def __init__(self, config: ModelConfig, target: TargetConfig, actions: ActionSpace):
        super().__init__()
        self.num_features = config.num_features  # D
        self.token_width = config.token_width  # T
        self.prediction_width = config.prediction_width  # E
        self.aggregator_action, self.predictor_action = config.aggregator_action, config.predictor_action
        uses_actions = config.aggregator_action or config.predictor_action
        action_width = config.action_dim * config.predictor_action
        self.has_tokens = config.encoder.has_tokens
        self.num_codes = config.encoder.codes.num_codes  # K; 0 if tokens have none
        self.encoder: Any = build_encoder(config)
        self.action_embedding = ActionEmbedding(actions.dim, config.action_dim) if uses_actions else None
        self.aggregator: Aggregator = config.aggregator.build(self.token_width)
        self.predictor = config.predictor.build(self.token_width, action_width, self.prediction_width)
        self.projector = config.projector.build(self.num_features)
        self.target: Target = target.build(self.encoder, self.projector)
        self.inverse = config.inverse.build(self.num_features, actions.dim)
        self.subspaces = config.subspaces.build(self.num_features, actions)
        self.local: Any = config.local.build(config.encoder, actions.dim)  # LocalBlocks, which builds on this module
        if self.local is not None:
            for block in self.encoder.blocks()[: self.local.first]:
                block.requires_grad_(False)
        self.memory: EncoderMemory | None = config.memory.build(self.encoder, self.num_features)
        self.sharpening: Sharpening | None = target.sharpening.build(self.prediction_width)

    def forward(
        self,
        views: Views,
        actions: Tensor,
        inverse_actions: Tensor | None = None,
        spans: tuple[Span, ...] | None = None,
    ) -> Output:
        """Encode, aggregate, predict.

        Args:
            views: [B, V, ...].
            actions: [B, V - 1, A]; action i takes view i to view i + 1.
            inverse_actions: [B, V - 1, A]; action i takes view i + 1 back to view i. Spans that read backwards need it.
            spans: which views are predicted, and from which; by default, the last view from all others.
        """
        spans = spans or (Span(0, actions.shape[1]),)
        z, target_z, tokens = self.encode_views(views, spans)
        past = None
        if self.memory is not None:
            past = self.memory.features(each(views, lambda x: x[:, : z.shape[1]]))
        return self.predict(z, target_z, actions, inverse_actions, spans, past)._replace(tokens=tokens)

    def encode_views(self, views: Views, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor | None, Tokens | None]:
        """Features of the encoded views and of the targets, for `predict`.

        Returns:
            Encoder features [B, N, D] of all views or of those that are read; features of the n targets [B, n, D], in
            the order of `targets_of`, or None if the former contain them; and tokens of the N views, if the encoder has
            some.
        """
        joint, encoder = self.target.joint, self.encoder
        seen = views if joint or any(span.backwards for span in spans) else each(views, lambda x: x[:, :-1])
        z, tokens = encoder.with_tokens(seen) if self.has_tokens else (encoder(seen), None)
        if joint:
            return z, None, tokens
        targets = each(views, lambda x: _select(x, targets_of(spans)))
        return z, self.target.features(encoder, targets), tokens

    def predict(
        self,
        z: Tensor,
        target_z: Tensor | None,
        actions: Tensor,
        inverse_actions: Tensor | None = None,
        spans: tuple[Span, ...] | None = None,
        past: Tensor | None = None,
    ) -> Output:
        """Everything after the encoder; takes what `encode_views` returns and the other arguments of `forward`.

        `past` [B, N, D] are the features of the last task's encoder, if the network has a memory.
        """
        num_observed = actions.shape[1]
        spans = spans or (Span(0, num_observed),)
        targeted = targets_of(spans)
        if target_z is None:
            target_z = _select(z, targeted)
        projections = None
        targets = target_z
        if self.projector is not None:
            projections = self.projector(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            if self.target.joint:
                targets = _select(projections, targeted)
            else:
                targets = self.target.project(self.projector, target_z.flatten(0, 1)).unflatten(0, target_z.shape[:2])
        if self.target.detached:
            targets = targets.detach()
        if self.sharpening is not None:
            targets = self.sharpening(targets)
        if inverse_actions is None:
            embedded = embedded_back = self.embed(actions)
        else:  # both directions are normalised together
            embedded, turned = self.embed(torch.cat([actions, inverse_actions.flip(1)])).chunk(2)
            embedded_back = turned.flip(1)
        readings: dict[Span, Reading] = {}
        for alike in _alike(spans):
            read = torch.cat([_views_of(span, z) for span in alike])
            moves = torch.cat([_actions_of(span, embedded_back if span.backwards else embedded) for span in alike])
            agg = self.aggregate(read, moves[:, :-1])
            predicted = self.predictor(agg, moves[:, -1] if self.predictor_action else None)
            parts = zip(alike, agg.chunk(len(alike)), predicted.chunk(len(alike)), strict=True)
            for span, part, prediction in parts:
                readings[span] = Reading(part, prediction, targets[:, targeted.index(span.target)])
        first, *others = (readings[span] for span in spans)
        inferred = given = None
        if self.inverse is not None:
            pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=-1)  # [B, N - 1, 2 D]
            inferred = self.inverse(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
            given = actions[:, : pairs.shape[1]]
        coordinates = None if self.subspaces is None else self.subspaces(z, actions[:, : z.shape[1] - 1])
        recalled = None if self.memory is None or past is None else self.memory(z, past)
        observed, others = z[:, :num_observed], tuple(others)
        return Output(
            observed, *first, z, target_z.detach(), projections, others, inferred, given, coordinates, recalled
        )

    def unread(self, reads: frozenset[str]) -> list[nn.Module]:
        """The parts that outputs with these names do not depend on, and which a loss of them would leave untrained."""
        predicts, aggregates = "prediction" in reads, bool({"prediction", "agg"} & reads)
        parts = [
            (self.predictor, predicts),
            (self.aggregator, aggregates),
            (self.action_embedding, predicts or (aggregates and self.aggregator_action)),
            (self.inverse, "inferred_actions" in reads),
            (self.subspaces, "coordinates" in reads),
            (self.memory, "recalled" in reads),
        ]
        return [part for part, read in parts if part is not None and not read]

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


def targets_of(spans: tuple[Span, ...]) -> list[int]:
    """The views that are predicted, each once."""
    return list(dict.fromkeys(span.target for span in spans))


def _alike(spans: tuple[Span, ...]) -> list[list[Span]]:
    """Spans of one length and direction, which pass through the network together."""
    groups: dict[tuple[int, bool], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.observed, span.backwards), []).append(span)
    return list(groups.values())


def _views_of(span: Span, x: Tensor) -> Tensor:
    """The entries of x [B, V, ...] that are read, in the order of reading."""
    return x[:, span.target + 1 : span.first + 1].flip(1) if span.backwards else x[:, span.first : span.target]


def _actions_of(span: Span, x: Tensor) -> Tensor:
    """The entries of x [B, V - 1, ...] that lead from view to view of the span, in the order of reading."""
    return x[:, span.target : span.first].flip(1) if span.backwards else x[:, span.first : span.target]


def _select(x: Tensor, views: list[int]) -> Tensor:
    """The entries `views` of x [B, N, ...], as [B, n, ...]."""
    return torch.stack([x[:, view] for view in views], dim=1)  # a list as index would sync
