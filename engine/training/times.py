"""How long a run takes, over all its starts, and what that costs."""

import time
from dataclasses import dataclass, field

from ..runs.state import TrainingState


@dataclass
class Stopwatch:
    """Seconds, sequences and steps since it was made."""

    started: float = field(default_factory=time.perf_counter)
    sequences: int = 0
    steps: int = 0

    def count(self, sequences: int) -> None:
        self.sequences += sequences
        self.steps += 1

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds that have passed."""
        self.started += seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Sequences a second."""
        return self.sequences / max(self.seconds, 1e-9)


class Times:
    """Seconds and hours of a run.

    Args:
        price: of an hour of the machine; None costs nothing.

    Attributes:
        seconds: of training and validation, over all starts.
        train_seconds: the same without validation.
        segment: the present segment's stopwatch.
        compilation: seconds of this start's first step, which the segment's stopwatch leaves out.
    """

    def __init__(self, price: float | None):
        self.price = price
        self.seconds = self.train_seconds = 0.0
        self.segment = Stopwatch()
        self.compilation = 0.0
        self.started = time.monotonic()
        self._earlier = 0.0  # seconds of earlier starts, until they last saved

    @property
    def hours(self) -> float:
        """Hours that the run has taken: this start, and earlier ones until they last saved."""
        return (self._earlier + time.monotonic() - self.started) / 3600

    def deadline(self, hours: float) -> float:
        """When this start must end, by the monotonic clock, for the run to have taken so many hours."""
        return self.started + 3600 * hours - self._earlier

    def cost(self, left: float = 0.0) -> dict[str, float]:
        """Cost so far and, with the seconds that are left, of the whole run; nothing without a price."""
        if self.price is None:
            return {}
        return {"cost": self.price * self.hours, "cost_expected": self.price * (self.hours + left / 3600)}

    def compiled(self) -> None:
        """The segment's first step is over, most of which was compilation: what follows is timed anew."""
        self.compilation = self.segment.seconds
        self.seconds += self.compilation
        self.segment = Stopwatch()

    def interrupted(self) -> None:
        """Count a segment that was not finished."""
        self.seconds += self.segment.seconds
        self.train_seconds += self.segment.seconds

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"seconds": self.seconds, "whole_seconds": 3600 * self.hours, "train_seconds": self.train_seconds}

    def restore(self, state: TrainingState) -> None:
        """Go on from a checkpoint's state."""
        self.seconds, self.train_seconds = state.seconds, state.train_seconds
        self._earlier = state.seconds if state.whole_seconds is None else state.whole_seconds
