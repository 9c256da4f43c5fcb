"""Config of the terms that training minimises."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Section

__all__ = ["ObjectiveConfig", "RateConfig", "SIGRegConfig", "VICRegConfig"]

PREDICTIONS = ("cosine", "mse", "cross_entropy")
UNIT_EPS = 0.5  # squared distortion of a rate of unit vectors (SimDINO's)


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
