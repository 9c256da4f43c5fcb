"""Config of the method: network, source of targets, terms of the objective, and which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from seqjepa.loaders import InputError
from seqjepa.loaders.config import Section

if TYPE_CHECKING:
    from seqjepa.engine.config import Config

__all__ = [
    "AblationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RateConfig",
    "SIGRegConfig",
    "TargetConfig",
    "VICRegConfig",
    "check_method",
]

PREDICTIONS = ("cosine", "mse", "cross_entropy")
UNIT_EPS = 0.5  # squared distortion of a rate of unit vectors (SimDINO's)


class ModelConfig(Section):
    """The network (spec of the paper's appendix; defaults are its CIFAR setting)."""

    encoder: Literal["resnet18", "convnet"] = "resnet18"
    """resnet18 with the CIFAR stem (512 features), or a four-layer convnet for small images."""
    width: int = Field(default=32, ge=4, le=512)
    """Channels of the convnet's first layer; its features are four times as many."""
    action_dim: int = Field(default=128, ge=1)
    """Width of the action embedding."""
    aggregator_action: bool = True
    """Whether the aggregator is told the actions between the views."""
    predictor_action: bool = True
    """Whether the predictor is told the action that leads to the target."""
    num_layers: int = Field(default=3, ge=1)
    """Transformer layers of the aggregator."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads of the aggregator."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the aggregator."""
    predictor_hidden: int = Field(default=1024, ge=1)
    """Hidden width of the predictor."""
    time_embedding: bool = False
    """Whether tokens carry a learnt embedding of their place (the paper's have none)."""
    projector_dim: int | None = Field(default=None, ge=2)
    """Width of a projection of z in which prediction, SIGReg and VICReg live; null has none, and they live in z."""
    projector_hidden: int = Field(default=2048, ge=1)
    """Width of the projector's two hidden layers."""
    projector_norm: Literal["none", "unit"] = "none"
    """Whether projections are scaled to unit length."""


class TargetConfig(Section):
    """Where the target comes from."""

    kind: Literal["ema", "stop_gradient", "shared"] = "ema"
    """ema: a teacher that averages the encoder; stop_gradient: the encoder itself; shared: the same, with gradient."""
    decay: float | None = Field(default=None, ge=0, le=1)
    """Decay of the teacher, ema only; null is 0.996."""
    schedule: Literal["constant", "cosine"] | None = None
    """Decay over training, ema only: constant, or a cosine from `decay` to 1; null is constant."""
    buffers: Literal["ignore", "copy", "average"] | None = None
    """Batch-norm statistics of the teacher, ema only: its own, the encoder's, or their average; null is ignore."""
    update: Literal["kernel", "torch"] | None = None
    """How the teacher is moved where optim.kind=adamw leaves it to this, ema only: in one launch (seqjepa.kernels), or
    tensor by tensor; null is kernel."""
    batch_statistics: Literal["joint", "own"] | None = None
    """Batch norm of the target view, without a teacher: with the observed views, or as a batch of its own, as in the
    reference; null is joint."""
    sharpening: bool = False
    """Whether the target is centred and made a distribution: softmax((target - center) / temperature)."""
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
            (kind == "ema", f"is a teacher's, and target.kind={kind} has none", teacher),
            (
                kind != "ema",
                "is for targets without a teacher, and target.kind=ema has one",
                {"batch_statistics": "joint"},
            ),
            (sharpening, "is the sharpening's, and target.sharpening is false", softmax),
        ):
            if applies:
                values = {**values, **{key: value for key, value in defaults.items() if values.get(key) is None}}
                continue
            for key in defaults:
                if values.get(key) is not None:
                    raise InputError(f"{reason}; null is allowed", key)
        return values


class ObjectiveConfig(Section):
    """The prediction's part of what training minimises; rate, sigreg and vicreg are sections of their own."""

    prediction: Literal["cosine", "mse", "cross_entropy"] = "cosine"
    """Distance between prediction and target: 1 - cosine, mean squared error, or cross-entropy with a sharpened one."""
    prediction_weight: float | None = Field(default=None, gt=0)
    """Its weight; null is 1 - sigreg.weight."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the prediction's softmax, cross_entropy only; null is 0.1."""
    symmetric: bool = False
    """Whether the sequence is also read backwards, predicting view 0; both readings are averaged."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("prediction", "cosine") not in PREDICTIONS:
            return values
        if values.get("prediction") == "cross_entropy":
            return {**values, "temperature": 0.1 if values.get("temperature") is None else values["temperature"]}
        if values.get("temperature") is not None:
            raise InputError("is cross_entropy's; null is allowed", "temperature")
        return values


class RateConfig(Section):
    """Coding rate, which training maximises against collapse."""

    weight: float = Field(default=0.0, ge=0)
    """Weight; 0 leaves it out."""
    target: Literal["agg", "z", "both"] = "agg"
    """Features whose rate it is: the aggregate, z (the mean over the observed views), or the sum of both."""
    normalize: Literal["none", "unit", "fixed_gain"] = "none"
    """none: as they are, so that a growing LayerNorm gain raises the rate; unit: rows of length 1; fixed_gain: rows of
    mean 0 and variance 1."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the covariance; null is 1, the reference's, unless `eps` is given or normalize=unit."""
    eps: float | None = Field(default=None, gt=0)
    """Squared distortion, in place of alpha = d / eps; null is 0.5 for normalize=unit without `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> RateConfig:
        if self.alpha is not None and self.eps is not None:
            raise InputError(f"rate.alpha = {self.alpha:g} says it already; one of the two is allowed", "eps")
        return self

    @property
    def scale(self) -> dict[str, float]:
        """`alpha` or `eps`, as `coding_rate` takes them."""
        if self.alpha is None and (self.eps is not None or self.normalize == "unit"):
            return {"eps": UNIT_EPS if self.eps is None else self.eps}
        return {"alpha": 1.0 if self.alpha is None else self.alpha}


class SIGRegConfig(Section):
    """Sketched isotropic Gaussian regularisation of the projections of each view (LeJEPA)."""

    weight: float = Field(default=0.0, ge=0, lt=1)
    """Lambda of (1 - lambda) prediction + lambda SIGReg; 0 leaves it out."""
    num_slices: int = Field(default=1024, ge=1)
    """Random directions, new ones each step."""


class VICRegConfig(Section):
    """Variance and covariance terms on the projections of each view (VICReg)."""

    variance: float = Field(default=0.0, ge=0)
    """Weight of the hinge that keeps each dimension's deviation at 1; 0 leaves it out."""
    covariance: float = Field(default=0.0, ge=0)
    """Weight of the squared covariances; 0 leaves it out."""


class AblationConfig(Section):
    """Controls that must fail a gate which means something."""

    shuffle_actions: bool = False
    """Whether the model sees the actions of another sequence; the probes' targets stay true."""
    freeze_encoder: bool = False
    """Whether the encoder keeps its initial weights."""


def check_method(config: Config) -> None:
    """Refuse combinations that cannot work.

    Raises:
        InputError: names the field, what it clashes with, and what is allowed.
    """
    model, target, objective = config.model, config.target, config.objective
    features = 512 if model.encoder == "resnet18" else 4 * model.width
    width = features + model.action_dim * model.aggregator_action
    if width % model.num_heads:
        parts = "encoder features + model.action_dim" if model.aggregator_action else "encoder features"
        raise InputError(f"does not divide the token width {width} ({parts})", "model.num_heads")
    if model.aggregator_action and not model.predictor_action and config.sequence.num_observed == 1:
        raise InputError(
            "leaves no action with one observed view; model.aggregator_action=false says so, or observe two",
            "model.predictor_action",
        )
    if objective.prediction == "mse" and target.sharpening:
        raise InputError(
            "compares features, and target.sharpening=true makes the target a distribution; cosine or "
            "cross_entropy is allowed",
            "objective.prediction",
        )
    if objective.prediction == "cross_entropy" and not target.sharpening:
        raise InputError(
            "compares distributions; with target.sharpening=false cosine or mse is allowed",
            "objective.prediction",
        )
    if objective.prediction_weight is not None and config.sigreg.weight:
        raise InputError("sigreg.weight sets it to 1 - sigreg.weight; null is allowed", "objective.prediction_weight")
    if model.projector_dim is not None:
        if target.kind == "ema":
            raise InputError(
                "a teacher has no projector; null, or target.kind=shared or stop_gradient, is allowed",
                "model.projector_dim",
            )
        if target.batch_statistics == "own":
            raise InputError("leaves the target out of the projections; joint is allowed", "target.batch_statistics")
    if model.projector_norm == "unit" and model.projector_dim is None:
        raise InputError("there is no projector; none is allowed, or set model.projector_dim", "model.projector_norm")
    terms = {
        "sigreg.weight": config.sigreg.weight,
        "vicreg.variance": config.vicreg.variance,
        "vicreg.covariance": config.vicreg.covariance,
    }
    if model.projector_dim is not None and target.kind == "stop_gradient" and not any(terms.values()):
        raise InputError(
            f"no gradient would reach it; null, or a weight for {' or '.join(terms)}", "model.projector_dim"
        )
    for field, weight in terms.items():
        if weight and model.projector_dim is None:
            raise InputError("needs projections; set model.projector_dim, as in configs/variant/sigreg.yaml", field)
        if weight and model.projector_norm == "unit":
            raise InputError(
                f"takes away the scale that {field} = {weight:g} is to set; none is allowed",
                "model.projector_norm",
            )
