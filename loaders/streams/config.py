"""Config of a stream of tasks. It does not import torch, so that `--help` is instant."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Kind


class BufferConfig(Kind):
    """Images that are kept, to be trained on again."""

    def replayed(self, batch_size: int) -> int:
        """Number of the sequences of a batch that come from the buffer."""
        return 0


class NoBufferConfig(BufferConfig):
    """Nothing is kept."""

    kind: Literal["none"] = "none"

    def build(self, *args: Any) -> None:
        return None


class ReservoirConfig(BufferConfig):
    """Each image that has arrived is kept with the same probability, as by Vitter's algorithm R."""

    made_by = ".replay:Reservoir"

    kind: Literal["reservoir"] = "reservoir"
    size: int = Field(default=500, ge=1)
    """Largest number of images that are kept."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the sequences of a batch that come from the buffer; the rest is new."""

    def replayed(self, batch_size: int) -> int:
        return min(max(round(self.share * batch_size), 1), batch_size - 1)


class BalancedConfig(ReservoirConfig):
    """As many images are kept of each task, or of each class, as far as there are so many."""

    made_by = ".replay:Balanced"

    kind: Literal["balanced"] = "balanced"  # pyright: ignore[reportIncompatibleVariableOverride]
    by: Literal["task", "class"] = "task"
    """What is balanced."""


class CoresetConfig(ReservoirConfig):
    """When a task ends, images of it and of those kept before are chosen whose features have a large coding rate."""

    made_by = ".replay:Coreset"

    kind: Literal["coreset"] = "coreset"  # pyright: ignore[reportIncompatibleVariableOverride]
    eps: float = Field(default=0.5, gt=0)
    """Squared distortion of the coding rate, for features of unit length."""


class StreamConfig(Kind):
    """The order in which training images arrive."""

    free = frozenset({"trace_every"})
    has_tasks: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """Number of tasks."""
        return 0


class NoStreamConfig(StreamConfig):
    """All images are there from the start, and training passes over them `run.epochs` times."""

    kind: Literal["none"] = "none"

    def build(self, *args: Any) -> None:
        return None


class TasksConfig(StreamConfig):
    """Training images arrive task by task; every image belongs to one task."""

    has_tasks = True

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of each task; null passes once over the images of each."""
    mixed: bool = False
    """Whether the images of all tasks arrive together from the start (joint training), for as many steps: what a
    learner could reach that never forgets."""
    boundary: float = Field(default=0.0, ge=0, le=1)
    """Steps over which one task gives way to the next, as a share of the shorter of the two; 0 is a sudden change."""
    trace_every: int = Field(default=50, ge=0)
    """Optimiser steps between measurements of the earlier tasks while a later one is learnt; 0 makes none."""
    buffer: Annotated[
        NoBufferConfig | ReservoirConfig | BalancedConfig | CoresetConfig, Field(discriminator="kind")
    ] = NoBufferConfig()


class ClassesConfig(TasksConfig):
    """Classes arrive a few at a time, in an order that `run.seed` draws (class-incremental)."""

    made_by = ".order:by_classes"

    kind: Literal["classes"] = "classes"

    def untrained(self) -> NoStreamConfig:
        """When an image arrives does not matter to a network that is never trained."""
        return NoStreamConfig()

    tasks: int = Field(default=5, ge=2)
    """Number of tasks among which the classes are divided."""

    @property
    def count(self) -> int:
        return self.tasks


class FactorsConfig(TasksConfig):
    """The factors that move the views change from task to task (domain-incremental); the images are divided evenly."""

    made_by = ".order:by_factors"

    kind: Literal["factors"] = "factors"

    def untrained(self) -> Self:
        """What varies in the views of an image matters to any network; when it arrives does not."""
        return type(self)(factors=self.factors, strengths=self.strengths)

    factors: list[list[str]] = [["rotation"], ["translation_x", "translation_y"], ["scale"]]
    """Factors that vary in each task; the others leave the image unchanged."""
    strengths: list[Annotated[float, Field(gt=0, le=1)]] | None = None
    """How strongly the factors of each task move an image, as a share of what is drawn; null is 1 in every task."""

    @property
    def count(self) -> int:
        return len(self.factors)

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if len(self.factors) < 2 or not all(self.factors):
            raise InputError("must be two or more lists of factors, none of them empty", "factors")
        if self.strengths is not None and len(self.strengths) != len(self.factors):
            raise InputError(f"gives {len(self.strengths)} for {len(self.factors)} tasks", "strengths")
        return self


AnyStream = Annotated[NoStreamConfig | ClassesConfig | FactorsConfig, Field(discriminator="kind")]
