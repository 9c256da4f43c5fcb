"""The segments that training is divided into: how many there are, how long each is, where its batches come from.

The trainer counts, saves and resumes by segments. A new kind is a subclass of `Segments`, and a line in `segments_of`
that chooses it.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

from ...loaders.batch import Batch
from ...loaders.loader import Loaders
from ...loaders.streams.order import Stream
from ..config import Config
from ..runs.state import Position

CHUNK = 64  # steps of a stream whose images are looked up together


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


class Tasks(Segments):
    """The tasks of a stream, one after the other."""

    def __init__(self, stream: Stream, loaders: Loaders):
        self.stream, self.loader = stream, loaders.train

    def __len__(self) -> int:
        return len(self.stream.tasks)

    def start(self, segment: int) -> int:
        return int(self.stream.starts[segment])

    def batches(self, position: Position) -> Iterator[Batch]:
        first, last = self.start(position.segment) + position.step, self.start(position.segment + 1)
        for start in range(first, last, CHUNK):
            steps = range(start, min(start + CHUNK, last))
            yield from self.loader.arriving([self.stream.batch(step) for step in steps])


def segments_of(config: Config, loaders: Loaders) -> Segments:
    """The segments that a run is divided into."""
    return Epochs(config, loaders) if loaders.stream is None else Tasks(loaders.stream, loaders)
