"""Whether a metric has become better, and for how long it has not."""

from __future__ import annotations

import math
from typing import Any

from .config import EarlyStopConfig

__all__ = ["Patience", "improves"]


def improves(value: float, best: float | None, mode: str, least: float = 0.0) -> bool:
    """Whether a metric is better than the best so far, by more than `least`; NaN never is.

    Args:
        value: of the metric.
        best: so far; None before the first.
        mode: max or min.
        least: change that does not count yet.
    """
    if best is None or math.isnan(value):
        return not math.isnan(value)
    return (value - best if mode == "max" else best - value) > least


class Patience:
    """Counts validations without improvement, and says when there have been enough."""

    def __init__(self, config: EarlyStopConfig):
        self.config = config
        self.best: float | None = None
        self.waited = 0

    def see(self, metrics: dict[str, float]) -> None:
        """Take a validation into account."""
        if self.config.metric is None:
            return
        value = metrics[self.config.metric]
        if improves(value, self.best, self.config.mode, self.config.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def over(self) -> bool:
        return self.config.metric is not None and self.waited >= self.config.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        self.best, self.waited = state["best"], state["waited"]
