"""Config of the checkpoints of a run."""

from pydantic import Field

from ...configs.section import Operation


class CheckpointConfig(Operation):
    """What is saved, and how much of it is kept."""

    every: int = Field(default=1, ge=1)
    """Epochs between checkpoints; the last, the best and an interrupted one are always saved."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept, besides the best."""
