"""Config of the network, and what it can be asked to predict. It does not import torch, so that `--help` is instant."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from ...configs.section import Kind, Section
from .aggregators.config import AnyAggregator, TransformerConfig
from .encoders.config import AnyEncoder, EncoderConfig, ResNet18Config
from .predictors.config import AnyPredictor, MLPPredictorConfig
from .white_box.config import CrateLayers


class NeckConfig(Kind):
    """What turns the encoder's features into z, [N, D] -> [N, D']."""

    def width(self, features: int) -> int:
        """D', the width of z, for D features."""
        return features


class NoNeckConfig(NeckConfig):
    """z is what the encoder gives."""

    kind: Literal["none"] = "none"

    def build(self, features: int) -> None:
        """Nothing."""


class LinearNeckConfig(NeckConfig):
    """One layer and a batch norm without gain: each number of z has mean 0 and variance 1 over the views of a batch."""

    made_by = ".heads:LinearNeck"

    kind: Literal["linear"] = "linear"
    dim: int = Field(default=64, ge=2)
    """Width of z."""

    def width(self, features: int) -> int:
        return self.dim


class ProjectorConfig(Kind):
    """The network that projects features, [N, D] -> [N, E], before they are compared.

    Attributes:
        projects: whether there is one.
    """

    projects: ClassVar[bool] = True

    @property
    def fixes_scale(self) -> bool:
        """Whether all projections have the same length."""
        return False

    def width(self, features: int) -> int:
        """E, the width of predictions, for D features."""
        return features


class NoProjectorConfig(ProjectorConfig):
    """No projection: prediction and targets are compared as features of the encoder."""

    projects = False

    kind: Literal["none"] = "none"

    def build(self, features: int) -> None:
        """Nothing."""


class MLPProjectorConfig(ProjectorConfig):
    """Three layers with batch norm; prediction, SIGReg and VICReg act on its output."""

    made_by = ".heads:MLPProjector"

    kind: Literal["mlp"] = "mlp"
    dim: int = Field(default=128, ge=2)
    """Width of the projection."""
    hidden: int = Field(default=2048, ge=1)
    """Width of the two hidden layers."""
    unit: bool = False
    """Whether projections are scaled to unit length."""

    @property
    def fixes_scale(self) -> bool:
        return self.unit

    def width(self, features: int) -> int:
        return self.dim


class InverseConfig(Kind):
    """The network that infers the action from the features of two successive views: [N, 2 D] -> [N, A].

    Attributes:
        infers: whether there is one.
    """

    infers: ClassVar[bool] = True


class NoInverseConfig(InverseConfig):
    """Actions are not inferred."""

    infers = False

    kind: Literal["none"] = "none"

    def build(self, features: int, action_dim: int) -> None:
        """Nothing."""


class MLPInverseConfig(InverseConfig):
    """Two layers with batch norm."""

    made_by = ".heads:MLPInverse"

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(default=512, ge=1)
    """Hidden width."""


class SubspacesConfig(Kind):
    """Parts of z in which the factors of the sequence act.

    Attributes:
        splits: whether there are any.
    """

    splits: ClassVar[bool] = True


class NoSubspacesConfig(SubspacesConfig):
    """z is not split."""

    splits = False

    kind: Literal["none"] = "none"

    def build(self, features: int, actions: Any) -> None:
        """Nothing."""


class GroupSubspacesConfig(SubspacesConfig):
    """A learnt plane for each angle and a learnt direction for each number that moves add up to, all orthogonal."""

    made_by = ".subspaces:GroupSubspaces"

    kind: Literal["group"] = "group"


class MemoryConfig(Kind):
    """What is kept of the encoder when a task of a stream ends.

    Attributes:
        remembers: whether anything is.
    """

    remembers: ClassVar[bool] = True


class NoMemoryConfig(MemoryConfig):
    """Nothing is kept."""

    remembers = False

    kind: Literal["none"] = "none"

    def build(self, encoder: Any, features: int) -> None:
        """Nothing."""


class EncoderMemoryConfig(MemoryConfig):
    """A frozen copy, whose features the encoder goes on to hold (`objective.distillation`)."""

    made_by = ".memory:EncoderMemory"

    kind: Literal["encoder"] = "encoder"

    def untrained(self) -> NoMemoryConfig:
        """A network that is not trained has nothing to remember."""
        return NoMemoryConfig()


class LocalConfig(Kind):
    """How far gradients travel in the encoder.

    Attributes:
        stops: whether they stop between blocks.
    """

    stops: ClassVar[bool] = True


class EndToEndConfig(LocalConfig):
    """From the loss through all of it."""

    stops = False

    kind: Literal["none"] = "none"

    def build(self, encoder: EncoderConfig, action_dim: int) -> None:
        """Nothing."""


class BlocksConfig(LocalConfig):
    """Every block of the encoder learns by a head of its own, from the terms of the objective; what comes after the
    encoder learns by the prediction."""

    made_by = ".local:LocalBlocks"

    kind: Literal["blocks"] = "blocks"
    reach: Literal[1, 2, "all"] = 1
    """Blocks that the gradient of a head reaches: its own, also the one before it, or all up to its own."""
    heads: Literal["all", "last"] = "all"
    """Blocks that have a head. With last and reach=1, the others stay as they were born; with last and reach=all the
    encoder learns the same terms end to end."""
    order: Literal["together", "in_turn"] = "together"
    """Whether all heads learn in every step, or one after the other, each in its share of the steps, with a schedule of
    its own. What the optimiser keeps for a block is then freed when no later head reaches it."""
    head_dim: int = Field(default=64, ge=1)
    """Width of a head's projections."""
    head_hidden: int = Field(default=128, ge=1)
    """Hidden width of a head."""

    def untrained(self) -> EndToEndConfig:
        """A network that is not trained has no heads."""
        return EndToEndConfig()


class ModelConfig(Section):
    """The network; the defaults are the CIFAR setting of the paper's appendix."""

    encoder: AnyEncoder = ResNet18Config()
    neck: Annotated[NoNeckConfig | LinearNeckConfig, Field(discriminator="kind")] = NoNeckConfig()
    aggregator: AnyAggregator = TransformerConfig()
    predictor: AnyPredictor = MLPPredictorConfig()
    projector: Annotated[NoProjectorConfig | MLPProjectorConfig, Field(discriminator="kind")] = NoProjectorConfig()
    inverse: Annotated[NoInverseConfig | MLPInverseConfig, Field(discriminator="kind")] = NoInverseConfig()
    subspaces: Annotated[NoSubspacesConfig | GroupSubspacesConfig, Field(discriminator="kind")] = NoSubspacesConfig()
    local: Annotated[EndToEndConfig | BlocksConfig, Field(discriminator="kind")] = EndToEndConfig()
    memory: Annotated[NoMemoryConfig | EncoderMemoryConfig, Field(discriminator="kind")] = NoMemoryConfig()
    action_dim: int = Field(default=128, ge=1)
    """Width of the action embedding."""
    aggregator_action: bool = True
    """Whether the aggregator receives the actions between the views."""
    predictor_action: bool = True
    """Whether the predictor receives the action that leads to the target."""

    def settled(self, size: tuple[int, int]) -> Self:
        """The same, with what the encoder leaves open decided for images of a height and width."""
        return self.model_copy(update={"encoder": self.encoder.settled(size)})

    @property
    def crate_parts(self) -> list[str]:
        """Names of the parts that have layers of CRATE."""
        return [name for name, part in self if isinstance(part, CrateLayers)]

    @property
    def num_features(self) -> int:
        """D, the width of z."""
        return self.neck.width(self.encoder.num_features)

    @property
    def token_width(self) -> int:
        """T: a token is a view's features and, if the aggregator receives them, an embedded action."""
        return self.num_features + self.action_dim * self.aggregator_action

    @property
    def prediction_width(self) -> int:
        """Width E of predictions."""
        return self.projector.width(self.num_features)


class Span(NamedTuple):
    """Views that are read one after the other, and the next one, which is predicted: `first`, ..., then `target`.

    If `target` is the smaller number, they are read backwards.
    """

    first: int
    target: int

    @property
    def backwards(self) -> bool:
        return self.target < self.first

    @property
    def observed(self) -> int:
        """Number of views that are read."""
        return abs(self.target - self.first)
