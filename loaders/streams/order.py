"""Which images belong to which task, and which arrive in each step: pure functions of the seed."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...configs.errors import InputError
from ..draws import ARRIVAL_STREAM, PICK_STREAM, REPLAY_STREAM, ROWS_STREAM, TASK_STREAM, keys
from ..sampler import Sampler
from ..sequences import Sequence
from .config import ClassesConfig, FactorsConfig, TasksConfig
from .replay import Reservoir


class Task(NamedTuple):
    """A part of the images, and the factors that vary in the views of them."""

    name: str
    train: np.ndarray  # positions of its training images
    validation: np.ndarray  # and of its test images
    factors: tuple[str, ...] | None  # None: all
    strength: float = 1.0  # of the factors


class Split(NamedTuple):
    """Positions of the images of a split, and the class of every image of its source."""

    indices: np.ndarray
    labels: np.ndarray


def by_classes(
    config: ClassesConfig, train: Split, validation: Split, classes: list[str], sequence: Sequence, seed: int
) -> list[Task]:
    """Tasks of a few classes each.

    Raises:
        InputError: there are fewer classes than tasks, or a task has no images.
    """
    if config.tasks > len(classes):
        raise InputError(f"{config.tasks} is more than the {len(classes)} classes", "stream.tasks")
    order = np.argsort(keys(seed, TASK_STREAM, np.arange(len(classes))), kind="stable")
    tasks = []
    for part in np.array_split(order, config.tasks):
        name = ", ".join(classes[number] for number in sorted(part))
        ours, theirs = (split.indices[np.isin(split.labels[split.indices], part)] for split in (train, validation))
        tasks.append(Task(name, ours, theirs, None))
    return _checked(tasks, "stream.tasks")


def by_factors(
    config: FactorsConfig, train: Split, validation: Split, classes: list[str], sequence: Sequence, seed: int
) -> list[Task]:
    """Tasks in which some factors vary, as far as each task lets them; each has its share of the images.

    Raises:
        InputError: the sequence has no such factor, or none of its strength, or a task has no images.
    """
    known = sequence.columns
    for name in (name for names in config.factors for name in names):
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has no factor that can be held"
            raise InputError(f"{name}: sequence.kind={sequence.config.kind} {has}", "stream.factors")
    strengths = config.strengths or [1.0] * config.count
    for names, strength in zip(config.factors, strengths, strict=True):
        for name in names if strength < 1 else ():
            if set(known[name]) <= set(sequence.choices):
                raise InputError(f"{name} is drawn or not; its strength can be 1, not {strength:g}", "stream.strengths")
    parts = []
    for split in (train, validation):
        order = np.argsort(keys(seed, TASK_STREAM, split.indices), kind="stable")
        parts.append(np.array_split(split.indices[order], len(config.factors)))
    tasks = []
    for names, strength, ours, theirs in zip(config.factors, strengths, *parts, strict=True):
        name = ", ".join(names) + (f" at {strength:g}" if config.strengths else "")
        tasks.append(Task(name, ours, theirs, tuple(names), strength))
    return _checked(tasks, "stream.factors")


def _checked(tasks: list[Task], field: str) -> list[Task]:
    for task in tasks:
        for kind, positions in (("training", task.train), ("test", task.validation)):
            if not len(positions):
                raise InputError(f"the task {task.name!r} has no {kind} images", field)
    return tasks


class Stream:
    """The sequences of every optimiser step.

    The images of a task arrive one after another in an order of their own, and again in another order if there are
    more steps than images. In the first step nothing has arrived yet, so that its whole batch is new.

    Args:
        config: how the tasks follow each other, and what is kept.
        tasks: the tasks, in the order in which they come.
        labels: class of each position of the training source.
        sampler: sampler of the training images: its batch size, seed and sharing among processes.

    Raises:
        InputError: the buffer holds less than a batch takes from it.
    """

    def __init__(self, config: TasksConfig, tasks: list[Task], labels: np.ndarray, sampler: Sampler):
        self.sampler, self.tasks, seed = sampler, tasks, sampler.seed
        size = sampler.batch_size
        self.replayed = config.buffer.replayed(size)
        fresh = size - self.replayed
        # the first batch of all is new
        wanted = [len(task.train) - (size - fresh if number == 0 else 0) for number, task in enumerate(tasks)]
        lengths = [config.steps or max(1, count // fresh) for count in wanted]
        self.starts = np.cumsum([0, *lengths])
        self.pools = [np.concatenate([task.train for task in tasks])] if config.mixed else [t.train for t in tasks]
        shares = np.ones((self.starts[-1], 1)) if config.mixed else _shares(lengths, config.boundary)
        new = np.full(len(shares), fresh)
        new[0] = size
        self.counts = _whole(shares * new[:, None], new)  # of new images in each step, by pool
        self.arrived = np.concatenate([np.zeros((1, len(self.pools)), np.int64), self.counts.cumsum(0)])
        of = np.zeros(len(labels), np.int64)
        for number, task in enumerate(tasks):
            of[task.train] = number
        self.buffer: Reservoir | None = config.buffer.build(keys(seed, REPLAY_STREAM, np.arange(len(of))), of, labels)
        if self.buffer and self.replayed > (held := self.buffer.config.size):
            raise InputError(
                f"{held} is less than the {self.replayed} sequences of a batch that are to come from it",
                "stream.buffer.size",
            )
        self.order = lru_cache(maxsize=2 * len(self.pools))(self._order)
        self.latest = 0, np.empty(0, np.int64)  # a step, and what the buffer holds when it begins
        if self.replayed > (brought := len(np.unique(self.new(0)[0]))):
            raise InputError(
                f"a batch takes {self.replayed} sequences from the buffer, but the first brings only {brought} images",
                "stream.buffer.share",
            )

    def _order(self, pool: int, turn: int) -> np.ndarray:
        """Positions of a pool in the order in which they arrive the first, second, ... time."""
        positions = self.pools[pool]
        return positions[np.argsort(keys(self.sampler.seed, ARRIVAL_STREAM, positions, turn), kind="stable")]

    def new(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the images that arrive in a step, and how often each has arrived before."""
        found, turns = [], []
        for pool, (number, last) in enumerate(self.arrived[step : step + 2].T):
            while number < last:
                turn, start = divmod(number, len(self.pools[pool]))
                part = self.order(pool, int(turn))[start : start + last - number]
                found.append(part)
                turns.append(np.full(len(part), turn))
                number += len(part)
        return np.concatenate(found), np.concatenate(turns)

    def kept(self, step: int) -> np.ndarray:
        """Positions of the images that the buffer holds when a step begins."""
        if self.buffer is None:
            return np.empty(0, np.int64)
        before, held = self.latest if self.latest[0] <= step else (0, np.empty(0, np.int64))
        if before < step:  # what was thrown out before never comes back
            bounds = self.arrived[[before, step]].T
            seen = [self.order(pool, 0)[first:last] for pool, (first, last) in enumerate(bounds)]
            held = self.buffer.kept(np.concatenate([held, *seen]))
            self.latest = step, held
        return held

    def candidates(self, task: int) -> np.ndarray:
        """Positions that a coreset may keep when a task, numbered from 0, ends: its images, and those kept before."""
        first, last = self.arrived[self.starts[[task, task + 1]]]
        new = [self.order(pool, 0)[first[pool] : last[pool]] for pool in range(len(self.pools))]
        return np.unique(np.concatenate([self.kept(int(self.starts[task])), *new]))

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and visits of this process's part of a step's batch.

        The number of a visit addresses the draws of an image's views, so that an image that comes again gets others: it
        is 2 n for an image that arrives for the nth time, from 0 on, and 2 step + 1 for those of the buffer.
        """
        (positions, turns), seed = self.new(step), self.sampler.seed
        visits = 2 * turns
        if self.replayed and step:
            held = self.kept(step)
            picked = held[np.argsort(keys(seed, PICK_STREAM, held, step), kind="stable")[: self.replayed]]
            positions, visits = np.append(positions, picked), np.append(visits, np.full(len(picked), 2 * step + 1))
        mixed = np.argsort(keys(seed, ROWS_STREAM, np.arange(len(positions)), step), kind="stable")
        return self.sampler.part(positions[mixed]), self.sampler.part(visits[mixed])


def _shares(lengths: list[int], boundary: float) -> np.ndarray:
    """Share of each task in the new images of each step, float [steps, tasks]."""
    starts = np.cumsum([0, *lengths])
    shares = np.zeros((starts[-1], len(lengths)))
    for task, (start, stop) in enumerate(pairwise(starts)):
        shares[start:stop, task] = 1
    for task in range(len(lengths) - 1):
        width = 2 * (round(boundary * min(lengths[task : task + 2])) // 2)
        window = slice(starts[task + 1] - width // 2, starts[task + 1] + width // 2)
        rising = (np.arange(width) + 0.5) / max(width, 1)
        shares[window] = 0
        shares[window, task], shares[window, task + 1] = 1 - rising, rising
    return shares


def _whole(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Whole numbers near `parts` [steps, tasks] that add up to `totals` [steps] in each row."""
    edges = np.rint(parts.cumsum(1)).astype(np.int64)
    edges[:, -1] = totals
    return np.diff(edges, axis=1, prepend=0)
