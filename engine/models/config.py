"""Config of the network and of the source of its targets, and what it can be asked to predict."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Kind, Section
from .quantisers.config import AnyQuantiser, NoQuantiserConfig, QuantiserConfig


class CrateLayers(Section):
    """Settings of layers that compress by attention in subspaces and then sparsify: CRATE's."""

    num_layers: int = Field(default=2, ge=1)
    """Number of layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of subspaces of each layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention's weights and output."""
    coding: Literal["square", "overcomplete"] = "square"
    """Dictionary of the sparse coding: square, without a residual (CRATE), or four times as wide as a token, with a
    dictionary of its own for the synthesis and a residual (CRATE-alpha)."""
    step: float = Field(default=0.1, gt=0)
    """Step size of the sparse coding."""
    threshold: float = Field(default=0.1, ge=0)
    """Weight of the l1 norm of the codes."""
    longest_step: float | None = Field(default=None, gt=0)
    """After each training step, dictionaries D are shrunk to step * |D|² of about this at most; null only warns above
    1.8. Below 2, a step of the sparse coding never raises its objective."""


class EncoderConfig(Kind):
    """The network that sees each view by itself: views [B, N, ...] -> features [B, N, D].

    Attributes:
        sees: what a view is.
        has_tokens: whether it also gives tokens of the parts of a view.
    """

    sees: ClassVar[Literal["images", "grids"]] = "images"
    has_tokens: ClassVar[bool] = False

    @property
    def codes(self) -> QuantiserConfig:
        """The codes that its tokens get."""
        return NoQuantiserConfig()

    @property
    def num_features(self) -> int:
        """Number D of features."""
        raise NotImplementedError

    @property
    def block_widths(self) -> list[int]:
        """Channels of each of its blocks, after which gradients may be stopped; empty if it names none."""
        return []

    def check_images(self, size: tuple[int, int]) -> None:
        """Refuse images of a height and width that the network cannot see; any is allowed by default.

        Raises:
            InputError: names the field that does not fit.
        """


class ResNet18Config(EncoderConfig):
    """ResNet-18 with the CIFAR stem, for images of 28 pixels or more; 512 features."""

    made_by = ".encoders.resnet:ResNet18"

    kind: Literal["resnet18"] = "resnet18"

    @property
    def num_features(self) -> int:
        return 512

    @property
    def block_widths(self) -> list[int]:
        return [64, 64, 128, 128, 256, 256, 512, 512]


class ConvNetConfig(EncoderConfig):
    """Four convolutions, for images of 16 to 28 pixels."""

    made_by = ".encoders.convnet:ConvNet"

    kind: Literal["convnet"] = "convnet"
    width: int = Field(default=32, ge=4, le=512)
    """Channels of the first layer; there are four times as many features."""

    @property
    def num_features(self) -> int:
        return 4 * self.width

    @property
    def block_widths(self) -> list[int]:
        return [self.width, self.width, 2 * self.width, 4 * self.width]


class TimmConfig(EncoderConfig):
    """A network of timm by its name, such as resnet50 or vit_small_patch16_224, from random weights."""

    made_by = ".encoders.from_timm:TimmEncoder"

    kind: Literal["timm"] = "timm"
    name: str = "resnet50"
    """Name of the network; timm.list_models() has all."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """cifar: a 3x3 convolution, and no max-pooling, in the place of a ResNet's first layers; imagenet: as timm builds
    them; auto is cifar where input_size is at most 64 and the network is a ResNet."""
    input_size: int | None = Field(default=None, ge=8, le=1024)
    """Height and width of the images in pixels, which a ViT must know; null takes images of any size."""

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        try:
            _ = self.num_features
        except InputError as error:
            raise InputError(str(error), str(error.field).rpartition(".")[2]) from None
        return self

    @property
    def num_features(self) -> int:
        return self.implementation().width(self.name, self.stem, self.input_size)

    @property
    def fixed_size(self) -> bool:
        """Whether timm builds the network for images of one size."""
        return self.implementation().needs_a_size(self.name)

    def check_images(self, size: tuple[int, int]) -> None:
        wanted = self.input_size
        if wanted is None and self.fixed_size:
            raise InputError(
                f"{self.name} must know it; the images are {size[1]}x{size[0]}", "model.encoder.input_size"
            )
        if wanted is not None and size != (wanted, wanted):
            problem = f"images are {size[1]}x{size[0]} pixels, not {wanted}x{wanted}"
            raise InputError(problem, "model.encoder.input_size")


class CrateEncoderConfig(CrateLayers, EncoderConfig):
    """White-box vision transformer of CRATE: patches and a class token, whose features are z."""

    made_by = ".encoders.crate:CrateEncoder"

    kind: Literal["crate"] = "crate"
    size: Literal["custom", "tiny", "small", "base", "large"] = "custom"
    """Width, layers and heads of a published size, which then replace those below; custom takes them as they are."""
    dim: int = Field(default=192, ge=1)
    """Width of a token, and number of features."""
    num_layers: int = Field(default=6, ge=1)
    """Number of layers."""
    patch: int = Field(default=4, ge=1)
    """Height and width of a patch in pixels."""
    side: int = Field(default=32, ge=2)
    """Height and width of the images in pixels."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.side % self.patch:
            raise InputError(f"does not divide the side of {self.side} pixels", "patch")
        own = {name: type(self).model_fields[name].default for name in ("dim", "num_layers", "num_heads")}
        if self.size != "custom" and (name := next((n for n in own if getattr(self, n) != own[n]), None)):
            raise InputError(f"only applies with size=custom; {self.size} has its own", name)
        width, _, heads = self.shape
        if width % heads:
            raise InputError(f"does not divide the width {width}", "num_heads")
        return self

    def check_images(self, size: tuple[int, int]) -> None:
        if size != (self.side, self.side):
            raise InputError(
                f"images are {size[1]}x{size[0]} pixels, not {self.side}x{self.side}", "model.encoder.side"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, number of layers, number of heads."""
        published = {"tiny": (384, 12, 6), "small": (576, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}
        return published.get(self.size, (self.dim, self.num_layers, self.num_heads))

    @property
    def num_features(self) -> int:
        return self.shape[0]


class GridObjectsConfig(EncoderConfig):
    """Objects of a grid as tokens, with attention between those that meet; z is their mean."""

    made_by = ".encoders.grid_objects:GridObjects"
    sees = "grids"
    has_tokens = True

    kind: Literal["grid_objects"] = "grid_objects"
    slots: int = Field(default=16, ge=1, le=256)
    """Largest number of objects; smaller ones are left out."""
    features: Literal["rich", "legacy"] = "rich"
    """What is known of an object: rich has its colour as one of ten, and its shape."""
    connectivity: Literal[4, 8] = 4
    """Neighbours of a cell that belong to the same object: 4, or 8 with those at its corners."""
    attention: Literal["adjacent", "all"] = "adjacent"
    """Objects that an object attends to: those whose boxes meet its own, or all."""
    dim: int = Field(default=96, ge=1)
    """Width of a token, and number of features."""
    num_layers: int = Field(default=2, ge=0)
    """Number of layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of heads of the attention."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention's weights and of both branches of a layer."""

    quantiser: AnyQuantiser = NoQuantiserConfig()

    @property
    def num_features(self) -> int:
        return self.dim

    @property
    def codes(self) -> QuantiserConfig:
        return self.quantiser

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        for name, parts in (("num_heads", self.num_heads), ("quantiser.groups", self.quantiser.parts)):
            if self.dim % parts:
                raise InputError(f"does not divide the width {self.dim}", name)
        return self


class GridConvNetConfig(EncoderConfig):
    """Convolutions on the ten colours of a grid, as planes."""

    made_by = ".encoders.grid_convnet:GridConvNet"
    sees = "grids"

    kind: Literal["grid_convnet"] = "grid_convnet"
    width: int = Field(default=32, ge=1)
    """Channels of the first layer; there are four times as many features."""

    @property
    def num_features(self) -> int:
        return 4 * self.width


class GridCellsConfig(EncoderConfig):
    """Transformer on the cells of a grid, some of them to a token, with a token whose features are z."""

    made_by = ".encoders.grid_cells:GridCells"
    sees = "grids"

    kind: Literal["grid_cells"] = "grid_cells"
    side: int = Field(default=14, ge=1)
    """Height and width of the canvas."""
    patch: int = Field(default=2, ge=1)
    """Height and width of the cells of a token."""
    dim: int = Field(default=96, ge=1)
    """Width of a token, and number of features."""
    num_layers: int = Field(default=2, ge=0)
    """Number of layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of heads of the attention."""

    @property
    def num_features(self) -> int:
        return self.dim

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.side % self.patch:
            raise InputError(f"does not divide the side of {self.side} cells", "patch")
        if self.dim % self.num_heads:
            raise InputError(f"does not divide the width {self.dim}", "num_heads")
        return self

    def check_images(self, size: tuple[int, int]) -> None:
        if size != (self.side, self.side):
            raise InputError(
                f"grids lie on {size[1]}x{size[0]} cells, not {self.side}x{self.side}", "model.encoder.side"
            )


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

    made_by = ".aggregators.transformer:Transformer"

    kind: Literal["transformer"] = "transformer"
    num_layers: int = Field(default=3, ge=1)
    """Number of layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of each layer."""


class MeanConfig(AggregatorConfig):
    """Mean of the tokens: no weights, and a control for what an aggregator learns."""

    made_by = ".aggregators.mean:MeanToken"

    kind: Literal["mean"] = "mean"


class WeightedConfig(AggregatorConfig):
    """Weighted mean of the tokens, with weights of its own in each channel: a few numbers, learnt."""

    made_by = ".aggregators.weighted:WeightedViews"

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

    made_by = ".aggregators.crate:Crate"

    kind: Literal["crate"] = "crate"


class TostConfig(AttentiveConfig):
    """Token-statistics layers of ToST, linear in the number of views, with a read-out by one token's attention."""

    made_by = ".aggregators.tost:Tost"

    kind: Literal["tost"] = "tost"
    num_layers: int = Field(default=2, ge=1)
    """Number of layers of the tokens."""
    readout_layers: int = Field(default=1, ge=1)
    """Number of layers in which the AGG token attends to the tokens (2 in the paper)."""
    causal: bool = False
    """Whether each view sees only statistics of itself and the views before it."""
    gain: float = Field(default=1.0, gt=0)
    """Initial gain of each layer's output (the paper's 24 layers start with 1e-5)."""


class PredictorConfig(Kind):
    """The network that predicts the target from the aggregate [B, T] and the last action [B, P]: -> [B, E]."""


class MLPPredictorConfig(PredictorConfig):
    """Two layers with batch norm."""

    made_by = ".predictors.mlp:MLPPredictor"

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(default=1024, ge=1)
    """Hidden width."""


class CratePredictorConfig(CrateLayers, PredictorConfig):
    """White-box layers of CRATE on two tokens, the aggregate and the last action."""

    made_by = ".predictors.crate:CratePredictor"

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

    encoder: Annotated[
        ResNet18Config
        | ConvNetConfig
        | TimmConfig
        | CrateEncoderConfig
        | GridObjectsConfig
        | GridConvNetConfig
        | GridCellsConfig,
        Field(discriminator="kind"),
    ] = ResNet18Config()
    neck: Annotated[NoNeckConfig | LinearNeckConfig, Field(discriminator="kind")] = NoNeckConfig()
    aggregator: Annotated[
        TransformerConfig | MeanConfig | WeightedConfig | CrateConfig | TostConfig, Field(discriminator="kind")
    ] = TransformerConfig()
    predictor: Annotated[MLPPredictorConfig | CratePredictorConfig, Field(discriminator="kind")] = MLPPredictorConfig()
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


class SharpeningConfig(Kind):
    """What is done to targets before they are compared.

    Attributes:
        makes_distributions: whether sharpened targets are distributions.
    """

    makes_distributions: ClassVar[bool] = False


class NoSharpeningConfig(SharpeningConfig):
    """The target is compared unchanged."""

    kind: Literal["none"] = "none"

    def build(self, width: int) -> None:
        """Nothing."""


class SoftmaxSharpeningConfig(SharpeningConfig):
    """The target is centred and turned into a distribution: softmax((target - center) / temperature)."""

    made_by = ".heads:SoftmaxSharpening"
    makes_distributions = True

    kind: Literal["softmax"] = "softmax"
    temperature: float = Field(default=0.04, gt=0)
    """Temperature of the softmax."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the center, a running mean of the targets."""


class TargetConfig(Kind):
    """Where the target comes from.

    Attributes:
        detached: whether no gradient passes through the target.
    """

    detached: ClassVar[bool] = True

    sharpening: Annotated[NoSharpeningConfig | SoftmaxSharpeningConfig, Field(discriminator="kind")] = (
        NoSharpeningConfig()
    )

    @property
    def joint(self) -> bool:
        """Whether the target view is encoded together with the observed views."""
        return False


class EMATargetConfig(TargetConfig):
    """A teacher whose weights are a moving average of those of the encoder and the projector."""

    made_by = ".targets.ema:EMATeacher"

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.996, ge=0, le=1)
    """Decay of the average."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Decay over training: constant, or a cosine from `decay` to 1."""
    buffers: Literal["ignore", "copy", "average"] = "ignore"
    """Batch-norm statistics and codes of the teacher: its own (ignore), the encoder's (copy), or a moving average of
    them (average)."""

    def untrained(self) -> Self:
        return type(self)(sharpening=self.sharpening)


class OnlineTargetConfig(TargetConfig):
    """The encoder's own features."""

    made_by = ".targets.online:OnlineTarget"

    batch_statistics: Literal["joint", "own"] = "joint"
    """Batch norm of the target view: together with the observed views (joint), or as a batch of its own (own), as in
    the reference code."""

    @property
    def joint(self) -> bool:
        return self.batch_statistics == "joint"


class StopGradientTargetConfig(OnlineTargetConfig):
    """The encoder's own features, without gradient."""

    kind: Literal["stop_gradient"] = "stop_gradient"


class SharedTargetConfig(OnlineTargetConfig):
    """The encoder's own features, with gradient."""

    detached = False

    kind: Literal["shared"] = "shared"

    def untrained(self) -> StopGradientTargetConfig:
        """Without training, a gradient makes no difference."""
        return StopGradientTargetConfig(sharpening=self.sharpening, batch_statistics=self.batch_statistics)


AnyTarget = Annotated[
    EMATargetConfig | StopGradientTargetConfig | SharedTargetConfig,
    Field(discriminator="kind"),
]


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
