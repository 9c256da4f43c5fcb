"""What a checkpoint knows besides tensors: a strict record, and the way to it from the records of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ...configs.errors import InputError, shown
from ...configs.section import Section
from .checksums import Damaged, read_failure, regular_file

__all__ = ["VERSION", "Settled", "TrainingState", "read_state"]

VERSION = 4

Metrics = dict[str, float | None]  # NaN is null


class Best(Section):
    """The best epoch so far; epoch 0 and no value before the first validation."""

    epoch: int = Field(ge=0)
    value: float | None
    metrics: Metrics


class Waiting(Section):
    """What early stopping remembers."""

    best: float | None
    waited: int = Field(ge=0)


class Settled(Section):
    """What the machine made of the config, where that says auto or nothing."""

    processes: int = Field(ge=1)
    device: str
    precision: str
    compile: str


class TrainingState(Section):
    """state.json."""

    version: int
    epoch: int = Field(ge=0)
    """Complete epochs."""
    step: int = Field(ge=0)
    """Steps of the next epoch that are done."""
    best: Best
    final: Metrics
    """Metrics of the last complete epoch."""
    patience: Waiting
    seconds: float = Field(ge=0)
    """Over all restarts, as `train_seconds`, which leaves out validation."""
    train_seconds: float = Field(ge=0)
    images: str
    """Fingerprint of the images."""
    wandb_id: str | None = Field(pattern=r"^[\w-]{1,128}$")
    commit: str | None
    config: dict[str, Any]
    settled: Settled | None = None
    """Missing in older records."""


def _from_3(state: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had no manifest beside it; early on, another name for the patience's best, and an idle temperature."""
    patience, objective = dict(state["patience"]), dict(state["config"]["objective"])
    if "value" in patience:
        patience["best"] = patience.pop("value")
    if objective["prediction"] != "cross_entropy":
        objective["temperature"] = None
    return state | {"version": 4, "patience": patience, "config": state["config"] | {"objective": objective}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _from_3}  # each to the next version


def read_state(path: Path) -> tuple[TrainingState, int]:
    """The record at `path`, brought to the present version, and the version that it had.

    Raises:
        Damaged: it is missing or holds no JSON.
        Unreadable: this user may not read it.
        InputError: it is not a record, or of a version that there is no way from.
    """
    regular_file(path)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise read_failure(path, error) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not readable ({type(error).__name__})", "run.resume") from None
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
        return TrainingState.model_validate(state), found
    except ValidationError as errors:
        error = errors.errors()[0]
        field = shown(".".join(map(str, error["loc"])))
        raise InputError(f"{path}: {field}: {error['msg'].lower()}", "run.resume") from None
