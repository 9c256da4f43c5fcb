"""Config of the objective and of its terms."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Built, Kind, Section
from ..models.config import Span


class TermConfig(Built):
    """A term of the objective; its field in `ObjectiveConfig` is its name.

    Attributes:
        of_scale: whether it regularises the scale of projections, which then must not have unit length.
    """

    of_training = True
    of_scale: ClassVar[bool] = False

    weight: float = Field(default=0.0, ge=0)
    """Weight of the term; 0 leaves it out."""

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Metrics that it tells of itself beside its value."""
        return ()

    @property
    def reads(self) -> frozenset[str]:
        """What it is computed from: names of fields of `Output`.

        Parts of the network that no term needs keep their initial weights; projections require a projector.
        """
        raise NotImplementedError


class PredictionConfig(TermConfig, Kind):
    """Distance of prediction and target.

    Attributes:
        of_distributions: whether targets must be distributions (True), must not be (False), or may be either (None).
    """

    of_distributions: ClassVar[bool | None] = None

    weight: float = Field(default=1.0, ge=0)
    """Weight of the term; 0 leaves it out."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"prediction"})

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


class InfoNCEConfig(PredictionConfig):
    """Cross-entropy of picking a prediction's own target among those of the whole batch, by cosine."""

    made_by = ".prediction:InfoNCE"
    of_distributions = False

    kind: Literal["infonce"] = "infonce"
    scale: float = Field(default=0.1, gt=0)
    """What cosines are divided by; at the start, if it is learnt."""
    scale_limits: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=2, max_length=2)
    """The scale is learnt within [lowest, highest]; null keeps it as it is."""
    queue: int = Field(default=0, ge=0)
    """Number of past targets that are further negatives, the latest ones; 0 has none."""

    @property
    def figure_names(self) -> tuple[str, ...]:
        return ("infonce_scale",) * bool(self.scale_limits) + ("infonce_queue",) * bool(self.queue)

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.scale_limits is not None and not self.scale_limits[0] <= self.scale <= self.scale_limits[1]:
            raise InputError(f"must be [lowest, highest], and scale = {self.scale:g} between them", "scale_limits")
        return self


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


class ScopeConfig(Kind):
    """The rows that a rate is computed of."""


class AllScopeConfig(ScopeConfig):
    """All rows of the batch."""

    kind: Literal["all"] = "all"


class NearestScopeConfig(ScopeConfig):
    """Each row and its nearest neighbours; the mean over these neighbourhoods (local coding rate)."""

    kind: Literal["nearest"] = "nearest"
    count: int = Field(default=16, ge=2)
    """Number of rows of a neighbourhood, at most the batch."""


class ImagesScopeConfig(ScopeConfig):
    """The views of each image; the mean over images."""

    kind: Literal["images"] = "images"


class RateConfig(TermConfig):
    """Coding rate, which training maximises against collapse."""

    made_by = ".rate:Rate"

    features: Literal["agg", "z", "both", "projections"] = "agg"
    """Features whose rate is computed: agg (aggregate), z (mean of the observed views' rates), the sum of both, or
    projections (mean of all views' rates)."""
    normalize: Literal["none", "unit", "fixed_gain"] = "none"
    """Scaling of the features. none: unchanged, so that a growing LayerNorm gain raises the rate; unit: rows of length
    1; fixed_gain: rows of mean 0 and variance 1."""
    scale: Annotated[AlphaConfig | EpsConfig, Field(discriminator="kind")] = AlphaConfig()
    scope: Annotated[AllScopeConfig | NearestScopeConfig | ImagesScopeConfig, Field(discriminator="kind")] = (
        AllScopeConfig()
    )

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"agg", "z"} if self.features == "both" else {self.features})

    @property
    def scaling(self) -> dict[str, Any]:
        """`alpha` or `eps`, as `coding_rate` takes them."""
        return self.scale.model_dump(exclude={"kind"})

    def untrained(self) -> Self:
        """Normalisation and scale stay, because rates are reported even without the term."""
        return type(self)(normalize=self.normalize, scale=self.scale)


class ProjectionsConfig(TermConfig):
    """A term that acts on projections."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"projections"})


class InvarianceConfig(ProjectionsConfig):
    """Distance of each view's projection from the mean over all views of its image."""

    made_by = ".invariance:Invariance"

    distance: Literal["cosine", "mse"] = "cosine"
    """cosine: 1 - cosine (EMP-SSL); mse: mean squared error (VICReg)."""


class InverseConfig(TermConfig):
    """Squared error of the action that is inferred from the features of two successive views."""

    made_by = ".inverse:Inverse"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"inferred_actions"})


class SIGRegConfig(ProjectionsConfig):
    """Sketched isotropic Gaussian regularisation of the projections of each view (LeJEPA)."""

    made_by = ".sigreg:SIGReg"
    of_scale = True

    num_slices: int = Field(default=1024, ge=1)
    """Number of random directions, drawn anew in each step."""


class VICRegConfig(TermConfig):
    """A regulariser of VICReg."""

    of_scale = True

    features: Literal["projections", "rest"] = "projections"
    """Features that it keeps apart: projections, or what z has outside of the factors' subspaces (rest)."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"coordinates" if self.features == "rest" else "projections"})


class VarianceConfig(VICRegConfig):
    """Hinge that keeps the standard deviation of each dimension of the features at 1 or more (VICReg)."""

    made_by = ".vicreg:Variance"


class CovarianceConfig(VICRegConfig):
    """Squared covariances between the dimensions of the features (VICReg)."""

    made_by = ".vicreg:Covariance"


class CoordinatesConfig(TermConfig):
    """A term that acts on the subspaces of the factors, or on the rest."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"coordinates"})


class EquivarianceConfig(CoordinatesConfig):
    """Error of z(g x) = ρ(g) z(x) in the subspaces of the factors: angles turn a plane, other moves shift a line."""

    made_by = ".group:Equivariance"

    extent: float = Field(default=1.0, gt=0)
    """Variance of each subspace, relative to that of the rest."""
    radius: float = Field(default=0.5, ge=0)
    """Weight of the circles' radius beside the angle."""


class RestConfig(CoordinatesConfig):
    """Share of the variance outside of the subspaces that lies between views of one image, not between images."""

    made_by = ".group:Rest"


class DistillationConfig(TermConfig):
    """Distance from the features that the encoder had when the last task of a stream ended."""

    made_by = ".distillation:Distillation"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"recalled"})


class TokensConfig(TermConfig):
    """A term of the tokens of a view's parts."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"tokens"})


class CommitmentConfig(TokensConfig):
    """Squared difference of tokens and their codes."""

    made_by = ".tokens:Commitment"


class UsageConfig(TokensConfig):
    """How far codes are from being used alike: 1 minus their entropy over the largest."""

    made_by = ".tokens:Usage"


class RelationalConfig(TokensConfig):
    """How differently the tokens of parts that meet lie to each other in the last view and in the others."""

    made_by = ".tokens:Relational"

    form: Literal["quantiles", "squares", "squares_over_variance"] = "quantiles"
    """quantiles: of distances over their mean, whatever the scale of tokens; squares: of squared distances, slot by
    slot; squares_over_variance: the same over the variance of tokens."""
    spread: float = Field(default=0.4, ge=0)
    """Weight of the variance over the other views, in the forms of squares."""


class AlterationConfig(TermConfig):
    """Squared difference of z of grids and of the same grids altered; all grids of a step are altered alike."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"altered"})


class RecolouredConfig(AlterationConfig):
    """Squared difference of z of grids and of the same grids after the colours 1 to 9 have changed places."""

    made_by = ".altered:Recoloured"


class ShiftedConfig(AlterationConfig):
    """Squared difference of z of grids and of the same grids shifted; what comes in is 0."""

    made_by = ".altered:Shifted"

    most: float = Field(default=0.1, gt=0, lt=1)
    """Largest share of height and width by which they are shifted, to whole cells."""


class MirroredConfig(AlterationConfig):
    """Squared difference of z of grids and of the same grids with their rows, or their columns, in reverse."""

    made_by = ".altered:Mirrored"


class ReadingConfig(Kind):
    """Which views of a sequence are predicted, and from which; the loss is averaged over these readings."""

    def spans(self, num_observed: int) -> list[Span]:
        """The readings of a sequence of `num_observed` + 1 views; the first is the one that probes see."""
        raise NotImplementedError


class ForwardReadingConfig(ReadingConfig):
    """The last view is predicted from all others, as in the paper."""

    kind: Literal["forward"] = "forward"

    def spans(self, num_observed: int) -> list[Span]:
        return [Span(0, num_observed)]


class BothReadingConfig(ReadingConfig):
    """The sequence is also read backwards, with inverse actions, and the first view is predicted."""

    kind: Literal["both"] = "both"

    def spans(self, num_observed: int) -> list[Span]:
        return [Span(0, num_observed), Span(num_observed, 0)]


class PrefixesReadingConfig(ReadingConfig):
    """Every view but the first is predicted from all views before it."""

    kind: Literal["prefixes"] = "prefixes"

    def spans(self, num_observed: int) -> list[Span]:
        return [Span(0, target) for target in range(num_observed, 0, -1)]


class WindowsReadingConfig(ReadingConfig):
    """Every view that has enough views before it is predicted from these.

    Views of images are drawn independently of each other, so that windows at fixed places are random subsets of them.
    """

    kind: Literal["windows"] = "windows"
    length: int = Field(default=1, ge=1, le=63)
    """Number of views in a window; 1 predicts each view from the one before it."""

    def spans(self, num_observed: int) -> list[Span]:
        return [Span(target - self.length, target) for target in range(num_observed, self.length - 1, -1)]


class BalanceConfig(Kind):
    """What changes the weights of the terms while training."""


class NoBalanceConfig(BalanceConfig):
    """Weights are constant."""

    kind: Literal["none"] = "none"

    def build(self, terms: int) -> None:
        """Nothing."""


class GradNormConfig(BalanceConfig):
    """Weights get factors that keep the terms' gradients in proportion to what each has still to learn (GradNorm)."""

    made_by = ".balance:GradNorm"
    of_training = True

    kind: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(default=1.5, ge=0)
    """Exponent of the share of a loss that is left: 0 makes all gradients alike."""
    every: int = Field(default=10, ge=1)
    """Optimiser steps between measurements of the gradients, each of which costs about a backward pass per term."""
    first: int = Field(default=5, ge=1)
    """Measurements over which the first loss is averaged; factors stay 1 until then."""
    rate: float = Field(default=0.1, gt=0, le=1)
    """Share of what is missing by which a measurement moves the logarithm of the factors."""

    def untrained(self) -> NoBalanceConfig:
        """A network that is not trained has no gradients."""
        return NoBalanceConfig()


class ObjectiveConfig(Section):
    """What training minimises: the sum of all terms whose weight is not 0."""

    prediction: Annotated[
        CosineConfig | MSEConfig | CrossEntropyConfig | InfoNCEConfig, Field(discriminator="kind")
    ] = CosineConfig()
    invariance: InvarianceConfig = InvarianceConfig()
    rate: RateConfig = RateConfig()
    inverse: InverseConfig = InverseConfig()
    sigreg: SIGRegConfig = SIGRegConfig()
    variance: VarianceConfig = VarianceConfig()
    covariance: CovarianceConfig = CovarianceConfig()
    equivariance: EquivarianceConfig = EquivarianceConfig()
    rest: RestConfig = RestConfig()
    distillation: DistillationConfig = DistillationConfig()
    commitment: CommitmentConfig = CommitmentConfig()
    usage: UsageConfig = UsageConfig()
    relational: RelationalConfig = RelationalConfig()
    recoloured: RecolouredConfig = RecolouredConfig()
    shifted: ShiftedConfig = ShiftedConfig()
    mirrored: MirroredConfig = MirroredConfig()
    reading: Annotated[
        ForwardReadingConfig | BothReadingConfig | PrefixesReadingConfig | WindowsReadingConfig,
        Field(discriminator="kind"),
    ] = ForwardReadingConfig()
    balance: Annotated[NoBalanceConfig | GradNormConfig, Field(discriminator="kind")] = NoBalanceConfig()

    @property
    def balanced(self) -> list[str]:
        """Names of the terms whose weights change while training."""
        return self.of_features if self.balance.kind != "none" else []

    @property
    def every_term(self) -> dict[str, TermConfig]:
        """All terms by name, including those whose weight is 0."""
        return {name: value for name, value in self if isinstance(value, TermConfig)}

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms whose weight is not 0, by name."""
        return {name: term for name, term in self.every_term.items() if term.weight}

    @property
    def of_features(self) -> list[str]:
        """Names of the terms that are functions of z; the others are of the tokens that z is made of."""
        return [name for name, term in self.terms.items() if "tokens" not in term.reads]

    @property
    def reads(self) -> frozenset[str]:
        """What the terms are computed from, as in `TermConfig.reads`."""
        return frozenset().union(*(term.reads for term in self.terms.values()))
