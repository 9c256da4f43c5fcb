"""Buffers of images that have arrived: what is kept is a pure function of what has arrived and of the seed.

Every image has a random number of its own; a buffer keeps the largest. It holds what an algorithm would that goes
through the stream and throws away at random, but has no state: after a restart, on any number of processes and with
any loader it is the same. Only a coreset, which depends on features, has one.
"""

import numpy as np

from .config import BalancedConfig, CoresetConfig, ReservoirConfig


class Reservoir:
    """Each image that has arrived is in the buffer with the same probability.

    The K largest of n independent uniform numbers are a uniformly drawn subset, and the K largest so far change as
    the content of Vitter's reservoir does: a new image enters with probability K / n and throws out one at random.
    Source: Vitter (1985), "Random sampling with a reservoir", algorithm R.

    Args:
        config: size of the buffer.
        keys: random number of each position of the dataset.
        tasks: number of the task of each position.
        labels: class of each position.
    """

    def __init__(self, config: ReservoirConfig, keys: np.ndarray, tasks: np.ndarray, labels: np.ndarray):
        self.config, self.keys = config, keys

    def kept(self, arrived: np.ndarray) -> np.ndarray:
        """The positions that are kept of those that have arrived, at most `size`, largest number first."""
        order = np.argsort(-self.keys[arrived], kind="stable")
        return arrived[order[: self.config.size]]


class Balanced(Reservoir):
    """The same within each group, of which all have as many places as far as they can fill them."""

    def __init__(self, config: BalancedConfig, keys: np.ndarray, tasks: np.ndarray, labels: np.ndarray):
        super().__init__(config, keys, tasks, labels)
        self.groups = tasks if config.by == "task" else labels

    def kept(self, arrived: np.ndarray) -> np.ndarray:
        groups = self.groups[arrived]
        order = np.lexsort((-self.keys[arrived], groups))
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        counts = np.diff(starts, append=len(order))
        places = np.arange(len(order)) - np.repeat(starts, counts)  # of each image within its group
        chosen = order[np.lexsort((-self.keys[arrived][order], places))]
        return arrived[chosen[: self.config.size]]


class Coreset(Reservoir):
    """What was chosen when the last task ended; while the first lasts, a reservoir of it.

    Attributes:
        chosen: positions; None before a task has ended. Whoever has features sets it, and saves it with the run.
    """

    config: CoresetConfig
    chosen: np.ndarray | None = None

    def kept(self, arrived: np.ndarray) -> np.ndarray:
        return super().kept(arrived) if self.chosen is None else self.chosen
