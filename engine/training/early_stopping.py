"""Early stopping: whether a metric has improved, and for how many validations it has not."""

import math

from ..runs.state import Waiting
from .config import EarlyStopConfig


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than `min_delta`; the first one is, and NaN never is."""
    if best is None or math.isnan(value):
        return not math.isnan(value)
    return (value - best if mode == "max" else best - value) > min_delta


def waited(before: Waiting, config: EarlyStopConfig, metrics: dict[str, float]) -> Waiting:
    """What early stopping remembers after another validation."""
    if config.metric is None:
        return before
    value = metrics[config.metric]
    if improves(value, before.best, config.mode, config.min_delta):
        return Waiting.model_construct(best=value, waited=0)  # unvalidated: it may be infinite
    return before.model_copy(update={"waited": before.waited + 1})
