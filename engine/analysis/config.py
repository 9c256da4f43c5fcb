"""Config of what is measured about features."""

from __future__ import annotations

from pydantic import Field

from ...configs.section import Operation

__all__ = ["DiagnosticsConfig"]


class DiagnosticsConfig(Operation):
    """Collapse warnings at each validation; factor sweeps, subspaces and their figures now and then."""

    every: int = Field(default=100, ge=0)
    """Epochs between sweeps, where there is a validation; the last epoch always has one; 0 makes none."""
    anchors: int = Field(default=32, ge=8, le=1024)
    """Test images that are swept."""
    min_rank: float = Field(default=1.5, ge=1)
    """Effective rank (participation ratio of the spectrum) of z or agg below which a collapse is told of."""
    max_cosine: float = Field(default=0.99, gt=0, le=1)
    """Mean cosine between the features of two images above which a collapse is told of."""
