"""Typed config of the data and the action sequences. It does not import torch, so that `--help` is instant."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from ..configs.errors import InputError
from ..configs.section import Kind, Section
from .images import DATASETS

WholeRange = Annotated[list[int], Field(min_length=2, max_length=2)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]
Probability = Annotated[float, Field(ge=0, le=1)]


class CurriculumConfig(Kind):
    """Which part of the training images takes part in an epoch, the easiest ones first.

    An epoch always has the same number of steps; those that take part come several times.
    """

    def share(self, epoch: int) -> float:
        """The share of the images that takes part in an epoch, counted from 0."""
        raise NotImplementedError


class NoCurriculumConfig(CurriculumConfig):
    """All images take part from the start."""

    kind: Literal["none"] = "none"

    def share(self, epoch: int) -> float:
        return 1.0


class PhasesConfig(CurriculumConfig):
    """Equal parts, from the easiest on, are added one after the other."""

    kind: Literal["phases"] = "phases"
    until: list[int] = [20, 50]
    """Numbers of epochs after which the next part of the images is added; n numbers make n + 1 parts."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.until or self.until != sorted({max(1, epoch) for epoch in self.until}):
            raise InputError("must be one or several ascending numbers >= 1", "until")
        return self

    def share(self, epoch: int) -> float:
        return (1 + sum(epoch >= end for end in self.until)) / (1 + len(self.until))


class CompetenceConfig(CurriculumConfig):
    """A share that grows with the square root of time (Platanios et al. 2019, arXiv 1903.09848, equation 7)."""

    kind: Literal["competence"] = "competence"
    epochs: int = Field(default=50, ge=1)
    """Number of epochs after which all images take part."""
    start: float = Field(default=0.33, gt=0, le=1)
    """The share in the first epoch."""

    def share(self, epoch: int) -> float:
        squared = self.start**2
        return min(1.0, math.sqrt(epoch * (1 - squared) / self.epochs + squared))


AnyCurriculum = Annotated[NoCurriculumConfig | PhasesConfig | CompetenceConfig, Field(discriminator="kind")]


class DataConfig(Section):
    """Which images to train on, how many, and in what batches."""

    free = frozenset({"root", "loader", "cache", "download"})

    name: str = "digits_affine"
    """Name of the task, by which `gates.rules` are chosen. If it begins with the name of a dataset and `dataset` is
    changed, that part changes too: cifar100_aug becomes imagefolder_aug, for which CIFAR-100's gates do not apply. A
    name that is set by an override, or in the same file as `dataset`, is kept."""
    dataset: Literal[tuple(DATASETS)] = "digits"  # pyright: ignore[reportInvalidTypeForm] - whatever is registered
    """Source of the images: scikit-learn's digits (embedded), CIFAR-10, CIFAR-100, MNIST, or any ImageFolder; or of the
    grids on which programs begin: generated ones, or those of ARC's tasks, of up to 14 or 30 rows and columns."""
    root: str | None = None
    """Folder with train/ and test/ (or val/), each with a folder for each class or with images alone; for imagefolder
    also without test/, and then some images are held out; or a .beton, or its folder; or the folder of torchvision's
    files; of ARC's tasks, the folder with training/ and evaluation/, or any with such JSON files."""
    size: int | None = Field(default=None, ge=8, le=1024)
    """Height and width in pixels to which image files are brought: the largest square in the middle of each, resized
    with antialiasing. null takes files of one size as they are."""
    decoder: Literal["pillow", "torchcodec"] = "pillow"
    """What decodes JPEG files: Pillow, which reads large ones at a fraction of their size, or torchcodec, up to twice
    as fast where that does not help. Their pixels differ a little."""
    loader: Literal["auto", "resident", "mapped", "files", "ffcv"] = "auto"
    """Where the images are during training. resident: as uint8 on the device; mapped: decoded in one file on the disk,
    which all processes of a machine share through its cache; files: image files are decoded for each batch; ffcv: in
    betons. All give the same sequences, betons of JPEGs those of their own pixels. auto: ffcv where `root` has betons;
    else resident if they take at most half of the GPU's free memory, or a quarter of the host's (of several processes
    on a CPU together at most 256 MiB); else mapped if they take at most half of the host's memory; else files."""
    cache: str | None = None
    """Folder in which mapped keeps decoded images, and files the mean, deviation and checksum, for later runs; what is
    in it may be deleted between runs. null is seqjepa in $XDG_CACHE_HOME, or in ~/.cache."""
    download: bool = False
    """Whether torchvision may download CIFAR or MNIST into `root`."""
    batch_size: int = Field(default=64, ge=2)
    """Number of sequences in one optimiser step, over all processes and accumulated micro-batches."""
    train_subset: int | None = Field(default=None, ge=1)
    """Number of training images, drawn with `subset_seed`; null takes all."""
    val_subset: int | None = Field(default=None, ge=1)
    """Number of test images, drawn with `subset_seed` + 1; null takes all."""
    held_out: int | None = Field(default=None, ge=1)
    """Number of training images, drawn with `subset_seed` + 2, that are not trained on and take the place of the test
    images; settings should be chosen by them. null validates on the test images, and on a tenth of the images, or
    `val_subset` if that is less, where a folder has no test/ or val/."""
    subset_seed: int = Field(default=42, ge=0)
    """Seed of the subsets."""
    fixed_views: bool = False
    """Whether a training image has the same views in every epoch, instead of new ones."""
    curriculum: AnyCurriculum = NoCurriculumConfig()

    @model_validator(mode="after")
    def _check_curriculum(self) -> Self:
        if self.curriculum.kind != "none" and not self.fixed_views:
            raise InputError(
                "needs views of which one knows how easy they are: data.fixed_views=true", "curriculum.kind"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_after_dataset(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict) or given.get("dataset") not in list(DATASETS):
            return given
        origin = (info.context or {}).get  # the file or override that set a field
        together = origin("data.name") == origin("data.dataset")
        if "name" in given and (together or origin("data.name", "").startswith("override ")):
            return given
        name = given.get("name", cls.model_fields["name"].default)
        first = str(name).partition("_")[0]
        return given | {"name": given["dataset"] + name.removeprefix(first)} if first in DATASETS else given


class SequenceConfig(Kind):
    """How a sequence of views is drawn and rendered from one image."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    """Limits of each field that is a range."""
    views: ClassVar[Literal["images", "grids"]] = "images"
    """What a view is."""
    reversible: ClassVar[bool] = True
    """Whether there is a way back from each view to the one before."""
    graded: ClassVar[bool] = False
    """Whether it is known how hard a sequence is, so that a curriculum can begin with easy ones."""

    num_observed: int = Field(default=3, ge=1, le=63)
    """Number M of observed views; the target is one more view."""

    @property
    def groups(self) -> dict[str, Literal["circle", "line"]]:
        """The group that acts in each factor that has one and varies, by the factor's name; none by default.

        circle: angles, whose move is given by its sine and cosine; line: numbers that moves add up to.
        """
        return {}

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name, (low, high) in self.ranges.items():
            lo, hi = getattr(self, name)
            if not low <= lo <= hi <= high:
                raise InputError(f"must be [lowest, highest] within [{low:g}, {high:g}]", name)
        return self


class RotationConfig(SequenceConfig):
    """Each view is turned by a right angle, exactly."""

    made_by = ".sequences.rotation:Rotation"

    kind: Literal["rotation"] = "rotation"
    angles: list[int] = Field(default=[0, 90, 180, 270], min_length=1)
    """Degrees from which the angle is chosen; multiples of 90."""

    @property
    def groups(self) -> dict[str, Literal["circle", "line"]]:
        return {"rotation": "circle"} if len({angle % 360 for angle in self.angles}) > 1 else {}

    @model_validator(mode="after")
    def _check_angles(self) -> Self:
        if bad := [angle for angle in self.angles if angle % 90]:
            raise InputError(f"{bad[0]} is not a multiple of 90", "angles")
        return self


class AffineConfig(SequenceConfig):
    """Each view is scaled, rotated and translated."""

    made_by = ".sequences.affine:Affine"
    ranges = {"rotation": (-180, 180), "translation": (-64, 64), "scale": (0.05, 8)}

    kind: Literal["affine"] = "affine"
    rotation: Range = [-75.0, 75.0]
    """Lowest and highest angle, in degrees."""
    translation: WholeRange = [-4, 4]
    """Lowest and highest shift along x and y, in whole pixels."""
    scale: Range = [0.6, 1.0]
    """Lowest and highest zoom, drawn log-uniformly."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What is shown beyond the image: black, or the image mirrored at its outermost pixels."""

    @property
    def groups(self) -> dict[str, Literal["circle", "line"]]:
        found: dict[str, Literal["circle", "line"]] = {"rotation": "circle"}
        found |= dict.fromkeys(("translation_x", "translation_y", "scale"), "line")
        ranges = {"rotation": self.rotation, "scale": self.scale}
        varied = {name: len(set(ranges.get(name, self.translation))) > 1 for name in found}
        return {name: group for name, group in found.items() if varied[name]}


class AugmentConfig(SequenceConfig):
    """Each view is cropped, mirrored, jittered in colour, and perhaps turned gray, blurred or solarised."""

    made_by = ".sequences.augment:Augment"
    ranges = {
        "crop_area": (0.01, 1),
        "crop_ratio": (0.1, 10),
        "brightness": (0, 10),
        "contrast": (0, 10),
        "saturation": (0, 10),
        "hue": (-0.5, 0.5),
        "blur_sigma": (0.01, 100),
    }

    kind: Literal["augment"] = "augment"
    crop_area: Range = [0.2, 1.0]
    """Area of the crop, as a fraction of the image's area."""
    crop_ratio: Range = [0.75, 1.3333333333333333]
    """Width over height of the crop, drawn log-uniformly."""
    flip: Probability = 0.5
    """Probability with which a view is mirrored left to right."""
    jitter: Probability = 0.8
    """Probability of the colour jitter, whose four operations come in random order."""
    brightness: Range = [0.6, 1.4]
    """Factor by which the brightness is multiplied."""
    contrast: Range = [0.6, 1.4]
    """Factor by which the contrast is multiplied."""
    saturation: Range = [0.8, 1.2]
    """Factor by which the saturation is multiplied."""
    hue: Range = [-0.1, 0.1]
    """Amount by which the hue is shifted, in turns of the colour wheel."""
    grayscale: Probability = 0.2
    """Probability with which a view loses its colour."""
    blur: Range = [1.0, 0.1]
    """Probabilities of the Gaussian blur: for observed views, and for the target."""
    blur_sigma: Range = [0.1, 2.0]
    """Sigma of the blur in pixels; its kernel has 2 round((H - 10) / 20) + 1 taps, 3 at 32 pixels."""
    solarize: Range = [0.0, 0.2]
    """Probabilities of solarising: for observed views, and for the target."""
    full_actions: bool = False
    """Whether actions include flip, grayscale and solarise; the paper leaves them out."""

    @model_validator(mode="after")
    def _check_probabilities(self) -> Self:
        for name in ("blur", "solarize"):
            if not all(0 <= probability <= 1 for probability in getattr(self, name)):
                raise InputError("must be two probabilities, each in [0, 1]", name)
        return self


class ChangesConfig(Section):
    """Changes of the grid on which a program begins, in training and in validation; all views show them.

    They are drawn anew for each view 0, so that a grid changes alike in each epoch if `data.fixed_views` is set.
    """

    symmetries: bool = False
    """Whether it is turned and mirrored, in one of eight ways."""
    colours: bool = False
    """Whether the colours 1 to 9 change places."""
    shift: int = Field(default=0, ge=0, le=30)
    """Cells by which it is shifted at most, along rows and along columns; what comes in is 0."""
    lost: Probability = 0.0
    """How likely each object, connected cells of one colour, becomes 0."""
    blank: Probability = 0.0
    """How likely each cell becomes 0."""
    noise: Probability = 0.0
    """How likely each cell gets any of the ten colours."""


class ProgramConfig(SequenceConfig):
    """Each view is what a move has made of the grid before it: mirrored, recoloured, cropped and so on."""

    made_by = ".sequences.program:Program"
    views = "grids"
    reversible = False
    graded = True

    kind: Literal["program"] = "program"
    draws: Literal["valid", "origin"] = "valid"
    """valid: moves that the grid allows, drawn again if they change nothing or leave next to nothing; origin: moves
    with any parameters, drawn again only if they change nothing."""
    changes: ChangesConfig = ChangesConfig()


AnySequence = Annotated[RotationConfig | AffineConfig | AugmentConfig | ProgramConfig, Field(discriminator="kind")]


class ActionsConfig(Section):
    """How the actions between views are encoded, for the model and for the probes."""

    normalization: Literal["standard", "view_l2", "none"] = "standard"
    """standard: divided by the constant standard deviation of their draws; view_l2: divided by their norm over the
    views, as in the reference code, which leaks the target; none: unchanged."""
