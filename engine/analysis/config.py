"""Config of the diagnostics."""

from pydantic import Field

from ...configs.section import Operation


class DiagnosticsConfig(Operation):
    """Collapse warnings at each validation; factor sweeps, subspaces and their figures every `every` epochs."""

    every: int = Field(default=100, ge=0)
    """Epochs between sweeps, which need a validation in the same epoch; the last epoch always has one; 0 is never."""
    anchors: int = Field(default=32, ge=8, le=1024)
    """Number of test images that are swept."""
    min_rank: float = Field(default=1.5, ge=1)
    """Warn of collapse if the effective rank (participation ratio of the spectrum) of z or agg is below this."""
    max_cosine: float = Field(default=0.99, gt=0, le=1)
    """Warn of collapse if the mean cosine between the features of two images is above this."""
