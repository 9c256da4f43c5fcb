"""Config of the trackers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation

LONGEST = 128  # characters that W&B allows in a name, project, entity or group


class TrackingConfig(Operation):
    """Experiment trackers; metrics.jsonl is always written. W&B's environment variables (WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_NAME, WANDB_INIT_TIMEOUT) replace the defaults of fields that are not set."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mode of Weights & Biases."""
    tensorboard: bool = False
    """Whether TensorBoard files are written too."""
    project: str = "seqjepa"
    """W&B project."""
    entity: str | None = None
    """W&B entity."""
    group: str | None = None
    """W&B group."""
    run_name: str | None = None
    """Name of the run in W&B; null is run.name."""
    init_timeout: float = Field(default=20.0, gt=0)
    """Seconds to wait for W&B's answer before the run continues offline."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        # offline, W&B accepts names that its server refuses when the run is uploaded
        for field, forbidden in {"project": "/\\#?%:", "entity": "/\\#?%: ", "group": "", "run_name": ""}.items():
            value = getattr(self, field)
            if self.wandb == "disabled" and field != "project":  # TensorBoard has a folder of the project's name
                continue
            if value is None or (
                1 <= len(value) <= LONGEST and value.isprintable() and not set(value) & set(forbidden)
            ):
                continue
            without = f", none of them one of {' '.join(forbidden.strip())}" if forbidden else ""
            without += " or a space" if " " in forbidden else ""
            raise InputError(f"must be one line of 1 to {LONGEST} characters{without}", field)
        return self
