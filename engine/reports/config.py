"""Config of the trackers, and W&B's own environment variables as its lowest layer."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation

LONGEST = 128  # characters that W&B allows in a name, project, entity or group
VARIABLES = {
    "WANDB_MODE": "wandb",
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_NAME": "run_name",
    "WANDB_INIT_TIMEOUT": "init_timeout",
}  # W&B reads the others itself, such as WANDB_TAGS and WANDB_BASE_URL
MODES = {"run": "online", "dryrun": "offline"}  # W&B's older names


class TrackingConfig(Operation):
    """Experiment trackers; metrics.jsonl is always written. W&B's environment variables (WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_NAME, WANDB_INIT_TIMEOUT) replace the defaults of fields that are not set."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mode of Weights & Biases."""
    trackio: bool = False
    """Whether Trackio records the run too: in its database on this machine, or where TRACKIO_SPACE_ID says."""
    tensorboard: bool = False
    """Whether TensorBoard files are written too."""
    project: str = "seqjepa"
    """Project in W&B and Trackio, and TensorBoard's folder."""
    entity: str | None = None
    """W&B entity."""
    group: str | None = None
    """Group in W&B and Trackio."""
    run_name: str | None = None
    """Name of the run in W&B and, before its id, in Trackio; null is run.name."""
    init_timeout: float = Field(default=20.0, gt=0)
    """Seconds to wait for W&B's answer before the run continues offline."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        # offline, W&B accepts names that its server refuses when the run is uploaded
        for field, forbidden in {"project": "/\\#?%:", "entity": "/\\#?%: ", "group": "", "run_name": ""}.items():
            value = getattr(self, field)
            used = self.wandb != "disabled" or field == "project"  # TensorBoard has a folder of the project's name
            if value is None or not used:
                continue
            if 1 <= len(value) <= LONGEST and value.isprintable() and not set(value) & set(forbidden):
                continue
            without = f", none of them one of {' '.join(forbidden.strip())}" if forbidden else ""
            without += " or a space" if " " in forbidden else ""
            raise InputError(f"must be one line of 1 to {LONGEST} characters{without}", field)
        return self


def wandb_layer(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """Name and values of a layer for `compose`, above the defaults and below files; None if no variable is set."""
    found: dict[str, Any] = {field: environment[name] for name, field in VARIABLES.items() if environment.get(name)}
    if mode := found.get("wandb"):
        found["wandb"] = MODES.get(mode, mode)
    if environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        found["wandb"] = "disabled"
    if found.get("wandb") == "disabled":  # the other variables do not matter then
        found = {"wandb": "disabled"}
    with contextlib.suppress(KeyError, ValueError):  # the config refuses text that is not a number
        found["init_timeout"] = float(found["init_timeout"])
    return ("W&B's environment", {"tracking": found}) if found else None


def overruled_of_wandb(tracking: TrackingConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each of W&B's environment variables that the run does not follow."""
    _, layer = wandb_layer(environment) or ("", {"tracking": {}})
    for variable, field in VARIABLES.items():
        given, used = layer["tracking"].get(field), getattr(tracking, field)
        if given not in (None, used) and (tracking.wandb != "disabled" or field == "wandb"):
            yield f"{variable}={given} is not used: tracking.{field} decides, and is {used}"
    # a sweep's agent sets both, and W&B then follows it
    if tracking.wandb != "disabled" and not environment.get("WANDB_SWEEP_ID"):
        for variable in ("WANDB_RUN_ID", "WANDB_RESUME"):
            if environment.get(variable):
                yield f"{variable} is not used: a run has its own id in W&B, and keeps it when it is resumed"
