"""Early stopping: whether a metric has improved, and for how many validations it has not."""

import math

from .config import EarlyStopConfig


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than `min_delta`; the first one is, and NaN never is."""
    if best is None or math.isnan(value):
        return not math.isnan(value)
    return (value - best if mode == "max" else best - value) > min_delta


class Patience:
    """Counts the validations since the last improvement."""

    def __init__(self, config: EarlyStopConfig):
        self.config = config
        self.best: float | None = None  # value of the metric so far
        self.waited = 0  # validations since then

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
        """Whether training should stop."""
        return self.config.metric is not None and self.waited >= self.config.patience
