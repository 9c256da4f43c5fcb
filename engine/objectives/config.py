"""Config of the objective and of its terms."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ...configs.section import Built, Kind, Section


class TermConfig(Built):
    """A term of the objective; its field in `ObjectiveConfig` is its name.

    Attributes:
        of_projections: whether it acts on projections, so that the model must have a projector.
        of_scale: whether it regularises the scale of projections, which then must not have unit length.
    """

    of_training = True
    of_projections: ClassVar[bool] = False
    of_scale: ClassVar[bool] = False

    weight: float = Field(default=0.0, ge=0)
    """Weight of the term; 0 leaves it out."""


class PredictionConfig(TermConfig, Kind):
    """Distance of prediction and target.

    Attributes:
        of_distributions: whether targets must be distributions (True), must not be (False), or may be either (None).
    """

    of_distributions: ClassVar[bool | None] = None

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term."""

    def untrained(self) -> "PredictionConfig":
        """An untrained network is the same for all distances between features."""
        return CosineConfig()


class CosineConfig(PredictionConfig):
    """1 - cosine, as in the paper."""

    made_by = ".prediction:Cosine"

    kind: Literal["cosine"] = "cosine"


class MSEConfig(PredictionConfig):
    """Mean squared error."""

    made_by = ".prediction:MSE"
    of_distributions = False

    kind: Literal["mse"] = "mse"


class CrossEntropyConfig(PredictionConfig):
    """Cross-entropy of a sharpened target and the softmax of the prediction (DINO's)."""

    made_by = ".prediction:CrossEntropy"
    of_distributions = True

    kind: Literal["cross_entropy"] = "cross_entropy"
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of the prediction's softmax."""

    def untrained(self) -> PredictionConfig:
        """This kind stays, because it changes the reported cosines: they compare distributions."""
        return type(self)(temperature=self.temperature)


class ScaleConfig(Kind):
    """Scale of the covariance."""


class AlphaConfig(ScaleConfig):
    """The covariance is multiplied by alpha (1 in the reference code): log det(I + alpha covariance)."""

    kind: Literal["alpha"] = "alpha"
    alpha: float = Field(default=1.0, gt=0)
    """Factor of the covariance."""


class EpsConfig(ScaleConfig):
    """The covariance is multiplied by d / eps for d features (0.5 is SimDINO's, for rows of unit length)."""

    kind: Literal["eps"] = "eps"
    eps: float = Field(default=0.5, gt=0)
    """Squared distortion."""


class RateConfig(TermConfig):
    """Coding rate, which training maximises against collapse."""

    made_by = ".rate:Rate"

    features: Literal["agg", "z", "both"] = "agg"
    """Features whose rate is computed: agg (aggregate), z (mean of the observed views' rates), or the sum of both."""
    normalize: Literal["none", "unit", "fixed_gain"] = "none"
    """Scaling of the features. none: unchanged, so that a growing LayerNorm gain raises the rate; unit: rows of length
    1; fixed_gain: rows of mean 0 and variance 1."""
    scale: Annotated[AlphaConfig | EpsConfig, Field(discriminator="kind")] = AlphaConfig()

    @property
    def scaling(self) -> dict[str, Any]:
        """`alpha` or `eps`, as `coding_rate` takes them."""
        return self.scale.model_dump(exclude={"kind"})

    def untrained(self) -> Self:
        """Normalisation and scale stay, because rates are reported even without the term."""
        return type(self)(normalize=self.normalize, scale=self.scale)


class SIGRegConfig(TermConfig):
    """Sketched isotropic Gaussian regularisation of the projections of each view (LeJEPA)."""

    made_by = ".sigreg:SIGReg"
    of_projections = True
    of_scale = True

    num_slices: int = Field(default=1024, ge=1)
    """Number of random directions, drawn anew in each step."""


class VarianceConfig(TermConfig):
    """Hinge that keeps the standard deviation of each dimension of projections at 1 or more (VICReg)."""

    made_by = ".vicreg:Variance"
    of_projections = True
    of_scale = True


class CovarianceConfig(TermConfig):
    """Squared covariances between the dimensions of projections (VICReg)."""

    made_by = ".vicreg:Covariance"
    of_projections = True
    of_scale = True


class ObjectiveConfig(Section):
    """What training minimises: the sum of all terms whose weight is not 0."""

    prediction: Annotated[CosineConfig | MSEConfig | CrossEntropyConfig, Field(discriminator="kind")] = CosineConfig()
    rate: RateConfig = RateConfig()
    sigreg: SIGRegConfig = SIGRegConfig()
    variance: VarianceConfig = VarianceConfig()
    covariance: CovarianceConfig = CovarianceConfig()
    symmetric: bool = False
    """Whether the sequence is also read backwards, predicting view 0; the losses of both readings are averaged."""

    @property
    def every_term(self) -> dict[str, TermConfig]:
        """All terms by name, including those whose weight is 0."""
        return {name: value for name, value in self if isinstance(value, TermConfig)}

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms whose weight is not 0, by name."""
        return {name: term for name, term in self.every_term.items() if term.weight}
