"""Config of the source of targets. It does not import torch, so that `--help` is instant."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from ....configs.section import Kind


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

    made_by = ".sharpening:SoftmaxSharpening"
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

    made_by = ".ema:EMATeacher"

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

    made_by = ".online:OnlineTarget"

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
