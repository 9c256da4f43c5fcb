"""Typed config of the data and of the action sequences. Imports no torch: `--help` must be instant."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from seqjepa.loaders import InputError

WholeRange = Annotated[list[int], Field(min_length=2, max_length=2)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types, NaN and infinities are errors; docs stand under fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Which images, from where, how many, in what batches."""

    name: str = "digits_affine"
    """Name of the task; tier files keep their gates under it."""
    dataset: Literal["digits", "cifar10", "cifar100", "mnist", "imagefolder"] = "digits"
    """Images: scikit-learn's digits (embedded), CIFAR-10, CIFAR-100, MNIST, or any ImageFolder."""
    root: str | None = None
    """Folder with train/ and test/ (ImageFolder), a .beton or its folder, or torchvision's own layout."""
    loader: Literal["auto", "ffcv", "resident"] = "auto"
    """Which loader: ffcv reads betons, resident keeps uint8 on the device; auto is ffcv where it can be."""
    download: bool = False
    """Whether torchvision may download CIFAR or MNIST into `root`."""
    batch_size: int = Field(default=64, ge=2)
    """Sequences in one optimiser step, over all processes and accumulated micro-batches."""
    train_subset: int | None = Field(default=None, ge=1)
    """Number of training images, drawn by `subset_seed`; null takes all."""
    val_subset: int | None = Field(default=None, ge=1)
    """Number of test images, drawn by `subset_seed` + 1; null takes all."""
    subset_seed: int = Field(default=42, ge=0)
    """Seed of the subsets."""


class SequenceConfig(Section):
    """How a sequence of views is drawn and rendered from one image."""

    kind: Literal["rotation", "affine"] = "affine"
    """rotation: right angles, exact; affine: rotation, translation and scale in one grid sample."""
    num_observed: int = Field(default=3, ge=1, le=16)
    """Number M of observed views; the target is one more."""
    angles: list[int] = Field(default=[0, 90, 180, 270], min_length=1)
    """Degrees that kind=rotation chooses from; multiples of 90."""
    rotation: Range = [-75.0, 75.0]
    """Degrees, lowest and highest, of kind=affine."""
    translation: WholeRange = [-4, 4]
    """Whole pixels, lowest and highest, of kind=affine, along x and y."""
    scale: Range = [0.6, 1.0]
    """Lowest and highest zoom of kind=affine; drawn log-uniformly."""

    @model_validator(mode="after")
    def _check_ranges(self) -> SequenceConfig:
        if bad := [angle for angle in self.angles if angle % 90]:
            raise InputError(f"{bad[0]} is not a multiple of 90", "angles")
        for name, low, high in (("rotation", -180, 180), ("translation", -64, 64), ("scale", 0.05, 8)):
            lo, hi = getattr(self, name)
            if not low <= lo <= hi <= high:
                raise InputError(f"must be [lowest, highest] within [{low}, {high}]", name)
        return self
