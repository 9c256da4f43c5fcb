"""What W&B's own environment variables say, as the lowest layer of the config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from .config import TrackingConfig

__all__ = ["overruled_of_wandb", "wandb_layer"]

VARIABLES = {
    "WANDB_MODE": "wandb",
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_NAME": "run_name",
    "WANDB_INIT_TIMEOUT": "init_timeout",
}  # the others, such as WANDB_TAGS and WANDB_BASE_URL, are W&B's to read
MODES = {"run": "online", "dryrun": "offline"}  # W&B's older words


def wandb_layer(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """A layer for `compose`, and its name: it comes before the defaults, and files and overrides come before it.

    Args:
        environment: variables of the process.

    Returns:
        None where no variable says anything.
    """
    found: dict[str, Any] = {
        field: environment[variable] for variable, field in VARIABLES.items() if environment.get(variable)
    }
    if "wandb" in found:
        found["wandb"] = MODES.get(found["wandb"], found["wandb"])
    if environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        found["wandb"] = "disabled"
    if found.get("wandb") == "disabled":  # what else it says is for nobody
        found = {"wandb": "disabled"}
    with contextlib.suppress(KeyError, ValueError):  # what is no number is refused as what it is
        found["init_timeout"] = float(found["init_timeout"])
    return ("W&B's environment", {"tracking": found}) if found else None


def overruled_of_wandb(tracking: TrackingConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each thing that W&B's environment says and this run does not do.

    Args:
        tracking: what the run does.
        environment: variables of the process.
    """
    _, layer = wandb_layer(environment) or ("", {"tracking": {}})
    for variable, field in VARIABLES.items():
        asked, decided = layer["tracking"].get(field), getattr(tracking, field)
        if asked not in (None, decided) and (tracking.wandb != "disabled" or field == "wandb"):
            yield f"{variable}={asked} is not used: tracking.{field} decides, and is {decided}"
    # a sweep's agent sets both, and W&B then follows it
    if tracking.wandb != "disabled" and not environment.get("WANDB_SWEEP_ID"):
        for variable in ("WANDB_RUN_ID", "WANDB_RESUME"):
            if environment.get(variable):
                yield f"{variable} is not used: a run has an id of its own in W&B, and keeps it when it is resumed"
