"""state.json, the record of a checkpoint: its fields, and the migration of older versions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import PIL
from pydantic import Field, ValidationError, WrapValidator

from ...configs.errors import InputError, first_line
from ...configs.migration import migrated
from ...configs.section import Section
from .checksums import reading, regular_file

VERSION = 6

Number = Annotated[float, WrapValidator(lambda value, check: math.nan if value is None else check(value))]
Metrics = dict[str, Number]  # null, as files hold it, is NaN
Count = Annotated[int, Field(ge=0, lt=2**32)]


class Position(NamedTuple):
    """How far training has come. It is divided into segments; an epoch is one kind of them."""

    segment: Count
    """Complete segments."""
    step: Count = 0
    """Steps of the next segment that are done."""


class Best(Section):
    """The best segment so far: how many were complete then; 0, without a value, before the first validation."""

    segment: Count
    value: float | None
    metrics: Metrics


class Waiting(Section):
    """What early stopping remembers: the best value of its metric, and the validations since then."""

    best: float | None
    waited: Count


class Settled(Section):
    """The values that settings such as run.device=auto have on a machine."""

    processes: int = Field(ge=1)
    device: str
    precision: str
    compile: str


class PixelFacts(Section):
    """The images that a network was trained on, as whoever uses its encoder needs to know them."""

    mean: list[float] = Field(min_length=1)
    """Mean of the training pixels in [0, 1], for each channel; 0 for grids, whose colours are not normalised."""
    std: list[float] = Field(min_length=1)
    """Their standard deviation."""
    size: list[int] = Field(min_length=2, max_length=2)
    """Height and width."""
    classes: list[str]
    """Names of the classes; empty if there are none."""


class TrainingState(Section):
    """The content of state.json, apart from older versions' names."""

    version: int
    """Of the file."""
    position: Position
    best: Best
    final: Metrics
    """Metrics of the last complete segment."""
    patience: Waiting
    seconds: float = Field(ge=0)
    """Duration of training and validation, over all restarts."""
    whole_seconds: float | None = Field(default=None, ge=0)
    """The same with reading, control and compilation, which cost too; missing in older records."""
    train_seconds: float = Field(ge=0)
    """The same without validation."""
    images: str
    """Fingerprint of the images; unknown in what other code trained."""
    wandb_id: str | None = Field(pattern=r"^[\w-]{1,128}$")
    commit: str | None
    config: dict[str, Any]
    settled: Settled | None = None
    """Missing in older records."""
    pixels: PixelFacts | None = None
    """Missing in older records."""
    pillow: str | None = None
    """Version of Pillow, whose resizing changes from one to another; missing in older records."""

    def other_pillow(self) -> str:
        """What may be said where images differ: another version of Pillow brought them to their size."""
        if self.pillow in (None, PIL.__version__):
            return ""
        return f"; Pillow {PIL.__version__} resizes a little differently from {self.pillow}, which was there then"

    def notice(self, path: Path) -> str | None:
        """A line for the user if the record is of an older version; None otherwise."""
        if self.version == VERSION:
            return None
        return f"{path}: a checkpoint of version {self.version}; its settings are read by their new names"


def _from_3(state: dict[str, Any]) -> dict[str, Any]:
    """Version 3 at first called early stopping's best value `value`, and kept a temperature that was not used."""
    patience, objective = dict(state["patience"]), dict(state["config"]["objective"])
    if "value" in patience:
        patience["best"] = patience.pop("value")
    if objective["prediction"] != "cross_entropy":
        objective["temperature"] = None
    return state | {"patience": patience, "config": state["config"] | {"objective": objective}}


def _from_4(state: dict[str, Any]) -> dict[str, Any]:
    """Version 4 counted epochs instead of segments, and had other names for some settings."""
    state, best = dict(state), dict(state["best"])
    position = {"segment": state.pop("epoch"), "step": state.pop("step")}
    best["segment"] = best.pop("epoch")
    return state | {"position": position, "best": best, "config": migrated(state["config"])}


def _from_5(state: dict[str, Any]) -> dict[str, Any]:
    """Version 5 did not standardise the features that probes see, and had another name for reading both ways."""
    config = migrated(state["config"])
    return state | {"config": config | {"probes": config["probes"] | {"standardize": False}}}


# each to the next version
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _from_3, 4: _from_4, 5: _from_5}


def read_state(path: Path) -> TrainingState:
    """The record at `path`, brought to the present form.

    Raises:
        Damaged: it is missing or holds no JSON.
        InputError: it is not a record, of a version that cannot be read, or this user may not read it.
    """
    regular_file(path)
    with reading(path):
        state = json.loads(path.read_text(encoding="utf-8"))
    found = state.get("version") if isinstance(state, dict) else None
    known = sorted([*MIGRATIONS, VERSION])
    if type(found) is not int or found not in known:
        allowed = ", ".join(map(str, known))
        raise InputError(f"{path}: a checkpoint of version {found!r}; {allowed} can be read", "run.resume")
    try:
        for version in range(found, VERSION):
            state = MIGRATIONS[version](state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: no record of version {found} ({type(error).__name__})", "run.resume") from None
    try:
        return TrainingState.model_validate(state)
    except ValidationError as error:
        raise InputError(f"{path}: {first_line(error)}", "run.resume") from None
