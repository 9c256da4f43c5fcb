"""The segments that training is divided into: how many there are, how long each is, where its batches come from.

The trainer counts, saves and resumes by segments. A new kind is a subclass of `Segments` in a file of its own, and a
line in `segments_of` that chooses it.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

from ...loaders.batch import Batch
from ...loaders.loader import Loaders
from ..config import Config
from ..runs.state import Position


class Segments(ABC):
    """A way to divide training into segments."""

    name: Literal["epoch", "segment"] = "segment"
    """What a segment is called in messages and in the names of checkpoints."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of segments."""

    @abstractmethod
    def start(self, segment: int) -> int:
        """Optimiser steps before a segment; with the number of segments, those of the whole run."""

    @abstractmethod
    def batches(self, position: Position) -> Iterator[Batch]:
        """Batches from a position to the end of its segment, the same ones on every call."""

    def steps(self, segment: int) -> int:
        """Optimiser steps of a segment."""
        return self.start(segment + 1) - self.start(segment)

    def segment_of(self, step: int) -> int:
        """The segment that an optimiser step of the run belongs to."""
        return bisect.bisect(range(1, len(self) + 1), step, key=self.start)


class Epochs(Segments):
    """Passes over the training images."""

    name = "epoch"

    def __init__(self, config: Config, loaders: Loaders):
        self.number, self.loader = config.run.epochs, loaders.train

    def __len__(self) -> int:
        return self.number

    def start(self, segment: int) -> int:
        return segment * len(self.loader)

    def batches(self, position: Position) -> Iterator[Batch]:
        return self.loader.epoch(*position)


def segments_of(config: Config, loaders: Loaders) -> Segments:
    """The segments that a run is divided into."""
    return Epochs(config, loaders)
