"""Config of the aggregator. It does not import torch, so that `--help` is instant."""

from typing import Annotated, Literal

from pydantic import Field

from ....configs.errors import InputError
from ....configs.section import Kind
from ..white_box.config import CrateLayers


class AggregatorConfig(Kind):
    """The network that reads the sequence: tokens [B, M, T] -> aggregate [B, T]."""

    def check_width(self, width: int) -> None:
        """Refuse a token width T that the aggregator cannot have; any is allowed by default.

        Raises:
            InputError: names the field of this section that does not fit.
        """

    @property
    def most_views(self) -> int | None:
        """The longest sequence that it can read; None if any.

        An aggregator with such a limit has weights for each position, and those that training does not reach stay
        untrained.
        """
        return None

    @property
    def limited_by(self) -> str:
        """The field that sets `most_views`."""
        return "positions"


class AttentiveConfig(AggregatorConfig):
    """An aggregator whose tokens attend to each other."""

    num_heads: int = Field(default=4, ge=1)
    """Attention heads, or subspaces, of each layer."""
    time_embedding: bool = False
    """Whether tokens carry a learnt position embedding (the paper's have none); in crate and tost it is that of the
    distance to the target."""
    positions: int = Field(default=16, ge=1, le=512)
    """Number of positions that have an embedding; no sequence may be longer (time_embedding=true)."""

    def check_width(self, width: int) -> None:
        if width % self.num_heads:
            raise InputError(f"does not divide the token width {width}", "num_heads")

    @property
    def most_views(self) -> int | None:
        return self.positions if self.time_embedding else None


class TransformerConfig(AttentiveConfig):
    """Transformer with a learnt AGG token, as in the paper."""

    made_by = ".transformer:Transformer"

    kind: Literal["transformer"] = "transformer"
    num_layers: int = Field(default=3, ge=1)
    """Number of layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of each layer."""


class MeanConfig(AggregatorConfig):
    """Mean of the tokens: no weights, and a control for what an aggregator learns."""

    made_by = ".mean:MeanToken"

    kind: Literal["mean"] = "mean"


class WeightedConfig(AggregatorConfig):
    """Weighted mean of the tokens, with weights of its own in each channel: a few numbers, learnt."""

    made_by = ".weighted:WeightedViews"

    kind: Literal["weighted"] = "weighted"
    longest: int = Field(default=7, ge=1, le=512)
    """Number of views that have weights; no sequence may be longer."""

    @property
    def most_views(self) -> int:
        return self.longest

    @property
    def limited_by(self) -> str:
        return "longest"


class CrateConfig(CrateLayers, AttentiveConfig):
    """White-box layers of CRATE with a learnt AGG token; each compresses tokens in subspaces and sparsifies them."""

    made_by = ".crate:Crate"

    kind: Literal["crate"] = "crate"


class TostConfig(AttentiveConfig):
    """Token-statistics layers of ToST, linear in the number of views, with a read-out by one token's attention."""

    made_by = ".tost:Tost"

    kind: Literal["tost"] = "tost"
    num_layers: int = Field(default=2, ge=1)
    """Number of layers of the tokens."""
    readout_layers: int = Field(default=1, ge=1)
    """Number of layers in which the AGG token attends to the tokens (2 in the paper)."""
    causal: bool = False
    """Whether each view sees only statistics of itself and the views before it."""
    gain: float = Field(default=1.0, gt=0)
    """Initial gain of each layer's output (the paper's 24 layers start with 1e-5)."""


AnyAggregator = Annotated[
    TransformerConfig | MeanConfig | WeightedConfig | CrateConfig | TostConfig, Field(discriminator="kind")
]
