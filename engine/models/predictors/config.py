"""Config of the predictor. It does not import torch, so that `--help` is instant."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ....configs.errors import InputError
from ....configs.section import Kind
from ..white_box.config import CrateLayers


class PredictorConfig(Kind):
    """The network that predicts the target from the aggregate [B, T] and the last action [B, P]: -> [B, E]."""


class MLPPredictorConfig(PredictorConfig):
    """Two layers with batch norm."""

    made_by = ".mlp:MLPPredictor"

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(default=1024, ge=1)
    """Hidden width."""


class CratePredictorConfig(CrateLayers, PredictorConfig):
    """White-box layers of CRATE on two tokens, the aggregate and the last action."""

    made_by = ".crate:CratePredictor"

    kind: Literal["crate"] = "crate"
    num_layers: int = Field(default=1, ge=1)
    """Number of layers."""
    coding: Literal["square", "overcomplete"] = "overcomplete"
    """Dictionary of the sparse coding, as in the aggregator of this kind."""
    dim: int = Field(default=96, ge=1)
    """Width of a token."""

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.dim % self.num_heads:
            raise InputError(f"does not divide the width {self.dim}", "num_heads")
        return self


AnyPredictor = Annotated[MLPPredictorConfig | CratePredictorConfig, Field(discriminator="kind")]
