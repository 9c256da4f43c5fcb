"""Config of the loss terms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Section

__all__ = ["ObjectiveConfig", "RateConfig", "SIGRegConfig", "VICRegConfig"]

PREDICTIONS = ("cosine", "mse", "cross_entropy")
UNIT_EPS = 0.5  # squared distortion of a rate of unit vectors (SimDINO's)


class ObjectiveConfig(Section):
    """The prediction term; the rate, SIGReg and VICReg terms have sections of their own."""

    prediction: Literal["cosine", "mse", "cross_entropy"] = "cosine"
    """Distance of prediction and target: 1 - cosine, mean squared error, or cross-entropy (of a sharpened target)."""
    prediction_weight: float | None = Field(default=None, gt=0)
    """Weight of the prediction term; null is 1 - sigreg.weight."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the prediction's softmax (prediction=cross_entropy only); null is 0.1."""
    symmetric: bool = False
    """Whether the sequence is also read backwards, predicting view 0; the losses of both readings are averaged."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("prediction", "cosine") not in PREDICTIONS:
            return values
        if values.get("prediction") == "cross_entropy":
            return {**values, "temperature": 0.1 if values.get("temperature") is None else values["temperature"]}
        if values.get("temperature") is not None:
            raise InputError(
                "only applies with objective.prediction=cross_entropy; remove it or set it to null", "temperature"
            )
        return values


class RateConfig(Section):
    """Coding rate, which training maximises against collapse."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the term; 0 leaves it out."""
    target: Literal["agg", "z", "both"] = "agg"
    """Features whose rate is computed: agg (aggregate), z (mean of the observed views' rates), or the sum of both."""
    normalize: Literal["none", "unit", "fixed_gain"] = "none"
    """Scaling of the features. none: unchanged, so that a growing LayerNorm gain raises the rate; unit: rows of length
    1; fixed_gain: rows of mean 0 and variance 1."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the covariance; null is 1, as in the reference code, unless `eps` is given or normalize=unit."""
    eps: float | None = Field(default=None, gt=0)
    """Squared distortion, which sets alpha = d / eps; null is 0.5 for normalize=unit without `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> RateConfig:
        if self.alpha is not None and self.eps is not None:
            raise InputError(f"rate.alpha = {self.alpha:g} is set too; set rate.alpha or rate.eps, not both", "eps")
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
    """Lambda in (1 - lambda) prediction + lambda SIGReg; 0 leaves the term out."""
    num_slices: int = Field(default=1024, ge=1)
    """Number of random directions, drawn anew in each step."""


class VICRegConfig(Section):
    """Variance and covariance terms on the projections of each view (VICReg)."""

    variance: float = Field(default=0.0, ge=0)
    """Weight of the hinge that keeps each dimension's standard deviation at 1 or more; 0 leaves it out."""
    covariance: float = Field(default=0.0, ge=0)
    """Weight of the squared covariances; 0 leaves it out."""
