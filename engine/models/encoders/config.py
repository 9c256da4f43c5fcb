"""Config of the encoder. It does not import torch, so that `--help` is instant."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ....configs.errors import InputError
from ....configs.section import Kind
from ..quantisers.config import AnyQuantiser, NoQuantiserConfig, QuantiserConfig
from ..white_box.config import CrateLayers

SMALL = 64  # pixels of a side up to which stem=auto is the one for small images


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

    def settled(self, size: tuple[int, int]) -> Self:
        """The same, with what is left open decided for images of a height and width."""
        return self


class ResNet18Config(EncoderConfig):
    """ResNet-18 with the CIFAR stem, for images of 28 pixels or more; 512 features."""

    made_by = ".resnet:ResNet18"

    kind: Literal["resnet18"] = "resnet18"

    @property
    def num_features(self) -> int:
        return 512

    @property
    def block_widths(self) -> list[int]:
        return [64, 64, 128, 128, 256, 256, 512, 512]


class ConvNetConfig(EncoderConfig):
    """Four convolutions, for images of 16 to 28 pixels."""

    made_by = ".convnet:ConvNet"

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

    made_by = ".from_timm:TimmEncoder"

    kind: Literal["timm"] = "timm"
    name: str = "resnet50"
    """Name of the network; timm.list_models() has all."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """cifar: a 3x3 convolution, and no max-pooling, in the place of a ResNet's first layers; imagenet: as timm builds
    them; auto is cifar for images of at most 64 pixels where the network is a ResNet, and a run writes what it was."""
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
        self.implementation().width(self.name, self.stem, wanted, size)

    def settled(self, size: tuple[int, int]) -> Self:
        if self.stem != "auto":
            return self
        small = max(size) <= SMALL and self.implementation().has_two_stems(self.name)
        return self.model_copy(update={"stem": "cifar" if small else "imagenet"})


class CrateEncoderConfig(CrateLayers, EncoderConfig):
    """White-box vision transformer of CRATE: patches and a class token, whose features are z."""

    made_by = ".crate:CrateEncoder"

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

    made_by = ".grid_objects:GridObjects"
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

    made_by = ".grid_convnet:GridConvNet"
    sees = "grids"

    kind: Literal["grid_convnet"] = "grid_convnet"
    width: int = Field(default=32, ge=1)
    """Channels of the first layer; there are four times as many features."""

    @property
    def num_features(self) -> int:
        return 4 * self.width


class GridCellsConfig(EncoderConfig):
    """Transformer on the cells of a grid, some of them to a token, with a token whose features are z."""

    made_by = ".grid_cells:GridCells"
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


AnyEncoder = Annotated[
    ResNet18Config
    | ConvNetConfig
    | TimmConfig
    | CrateEncoderConfig
    | GridObjectsConfig
    | GridConvNetConfig
    | GridCellsConfig,
    Field(discriminator="kind"),
]
