"""Config of the network and of the source of its targets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Section

__all__ = ["ModelConfig", "TargetConfig"]


class ModelConfig(Section):
    """The network; the defaults are the CIFAR setting of the paper's appendix."""

    encoder: Literal["resnet18", "convnet"] = "resnet18"
    """resnet18 with the CIFAR stem (512 features), or a four-layer convnet for small images."""
    width: int = Field(default=32, ge=4, le=512)
    """Channels of the convnet's first layer; it has four times as many features."""
    action_dim: int = Field(default=128, ge=1)
    """Width of the action embedding."""
    aggregator_action: bool = True
    """Whether the aggregator receives the actions between the views."""
    predictor_action: bool = True
    """Whether the predictor receives the action that leads to the target."""
    num_layers: int = Field(default=3, ge=1)
    """Transformer layers of the aggregator."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads of the aggregator."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the aggregator."""
    predictor_hidden: int = Field(default=1024, ge=1)
    """Hidden width of the predictor."""
    time_embedding: bool = False
    """Whether tokens carry a learnt position embedding (the paper's have none)."""
    projector_dim: int | None = Field(default=None, ge=2)
    """Width of the projection of z on which prediction, SIGReg and VICReg act; null: no projection, they act on z."""
    projector_hidden: int = Field(default=2048, ge=1)
    """Width of the projector's two hidden layers."""
    projector_norm: Literal["none", "unit"] = "none"
    """Whether projections are scaled to unit length."""


class TargetConfig(Section):
    """Where the target comes from."""

    kind: Literal["ema", "stop_gradient", "shared"] = "ema"
    """ema: a teacher that averages the encoder; stop_gradient: the encoder itself; shared: the same, with gradient."""
    decay: float | None = Field(default=None, ge=0, le=1)
    """Decay of the teacher (kind=ema only); null is 0.996."""
    schedule: Literal["constant", "cosine"] | None = None
    """Decay over training (kind=ema only): constant, or a cosine from `decay` to 1; null is constant."""
    buffers: Literal["ignore", "copy", "average"] | None = None
    """Batch-norm statistics of the teacher (kind=ema only): its own, the encoder's, or an average; null is ignore."""
    update: Literal["kernel", "torch"] | None = None
    """How the teacher is updated under optim.kind=adamw (kind=ema only): in one launch (seqjepa.kernels), or tensor by
    tensor; null is kernel."""
    batch_statistics: Literal["joint", "own"] | None = None
    """Batch norm of the target view (not for kind=ema): together with the observed views, or as a batch of its own, as
    in the reference code; null is joint."""
    sharpening: bool = False
    """Whether the target is centred and turned into a distribution: softmax((target - center) / temperature)."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the sharpening; null is 0.04."""
    center_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of the sharpening's center, a running mean of the targets; null is 0.9."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        kind, sharpening = values.get("kind", "ema"), values.get("sharpening", False)
        if kind not in ("ema", "stop_gradient", "shared") or not isinstance(sharpening, bool):
            return values
        teacher = {"decay": 0.996, "schedule": "constant", "buffers": "ignore", "update": "kernel"}
        softmax = {"temperature": 0.04, "center_momentum": 0.9}
        for applies, reason, defaults in (
            (kind == "ema", f"only applies with target.kind=ema (it is {kind})", teacher),
            (
                kind != "ema",
                "only applies with target.kind=stop_gradient or shared (it is ema)",
                {"batch_statistics": "joint"},
            ),
            (sharpening, "only applies with target.sharpening=true (it is false)", softmax),
        ):
            if applies:
                values = {**values, **{key: value for key, value in defaults.items() if values.get(key) is None}}
                continue
            for key in defaults:
                if values.get(key) is not None:
                    raise InputError(f"{reason}; remove it or set it to null", key)
        return values
