"""Which images make up each batch, by epoch and process; every loader follows it."""

import math
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np

from ..configs.errors import InputError
from .draws import ORDER_STREAM, keys


def subset(num_images: int, size: int | None, seed: int) -> np.ndarray:
    """The first `size` positions of a seeded permutation of all `num_images`, or all of them in order.

    All are taken if `size` is None or not smaller than their number. Python's own generator draws the permutation, as
    in the reference code, so that a seed chooses the same images as there.
    """
    positions = list(range(num_images))
    if size is not None and size < num_images:
        random.Random(seed).shuffle(positions)
        positions = positions[:size]
    return np.asarray(positions, dtype=np.int64)


@dataclass(eq=False)
class Sampler:
    """Order, batches and sharding of an epoch: a pure function of (seed, epoch).

    Args:
        indices: positions in the dataset that take part, int64 [N].
        batch_size: number of images in a batch, over all processes.
        seed: seed of the run.
        train: whether it samples for training, in a new order each epoch; validation keeps the order of `indices`.
        drop_last: whether an incomplete last batch is left out; None leaves it out in training.
        rank: number of this process.
        num_processes: number of processes that share each batch; each takes a contiguous part of each micro-batch.
        micro_batches: number of contiguous micro-batches into which a batch is split, before processes share it.
        curriculum: which share of the images takes part in an epoch of training; None or 1 takes all.
        difficulty: gives how hard each of the images is, int64 [N]; it is called where a curriculum leaves some out.

    Raises:
        InputError: the batch is larger than the training images, or is not divisible by the number of processes.
    """

    indices: np.ndarray
    _: KW_ONLY
    batch_size: int
    seed: int
    train: bool
    drop_last: bool | None = None
    rank: int = 0
    num_processes: int = 1
    micro_batches: int = 1
    curriculum: Callable[[int], float] | None = None
    difficulty: Callable[[], np.ndarray] | None = None

    def __post_init__(self):
        size, available = self.batch_size, len(self.indices)
        if self.drop_last is None:
            self.drop_last = self.train
        if self.drop_last and size > available:
            raise InputError(f"{size} is larger than the {available} training images", "data.batch_size")
        if self.train and size % self.num_processes:
            raise InputError(f"{size} is not divisible by {self.num_processes} processes", "data.batch_size")

    @property
    def local_batch_size(self) -> int:
        """Largest number of a batch's images that this process gets."""
        return -(-self.batch_size // self.num_processes)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.indices), self.batch_size)
        return full if self.drop_last else full + bool(rest)

    def order(self, epoch: int) -> np.ndarray:
        """Positions in the order of the epoch, int64 [N], the same on every process; the easiest are repeated."""
        if not self.train:
            return self.indices
        active, wanted = self.active(epoch), len(self.indices)
        turns = -(-wanted // max(1, len(active)))
        orders = [keys(self.seed, ORDER_STREAM, active, epoch, turn) for turn in range(max(1, turns))]
        return np.concatenate([active[np.argsort(order, kind="stable")] for order in orders])[:wanted]

    def active(self, epoch: int) -> np.ndarray:
        """Positions that take part in the epoch: all, or the easiest, of equally easy ones those that come first."""
        share = 1.0 if self.curriculum is None else self.curriculum(epoch)
        if share >= 1 or self.difficulty is None:
            return self.indices
        easiest = np.argsort(self.difficulty(), kind="stable")
        return self.indices[np.sort(easiest[: math.ceil(share * len(self.indices))])]

    def batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """This process's part of each batch of the epoch, from batch `start` on; a part may be empty."""
        order = self.order(epoch)
        cuts = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        return [self.part(order[cut : cut + self.batch_size]) for cut in cuts]

    def part(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of a batch."""
        micro_batches = np.array_split(batch, self.micro_batches)
        return np.concatenate([np.array_split(micro, self.num_processes)[self.rank] for micro in micro_batches])
