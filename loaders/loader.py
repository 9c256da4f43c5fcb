"""The loader that training iterates over: it turns images into batches of action sequences, all on the device."""

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..configs.errors import InputError
from .batch import Batch, padded
from .config import ActionsConfig, CurriculumConfig, DataConfig, SequenceConfig
from .draws import TRAIN_STREAM, VALIDATION_STREAM, words
from .images import DATASETS, find_dataset
from .images.base import SPLITS, Images
from .images.beton import INSTALL_HINT, BetonImages, has_ffcv, open_beton
from .images.cache import Cache
from .images.files import ImageFiles
from .images.sources import check_alike, find_layout, open_images
from .images.stores import Store, open_store, prepare, suited
from .sampler import Sampler, subset
from .sequences import Sequence, build_sequence
from .streams.config import NoStreamConfig, StreamConfig, TasksConfig
from .streams.order import Split, Stream, Task


class SequenceLoader:
    """Yields the batches of an epoch.

    Args:
        images: on the device, on the host, or in betons.
        sampler: order and sharding; a training sampler makes a training loader.
        sequence: draws and renders the views.
        mean: mean of the training pixels, for each channel, in [0, 1].
        std: standard deviation of the training pixels, in the same form.
        device: where everything happens.
        compiled: whether views are drawn and rendered by one compiled program, which has a fixed batch size.
        fixed: whether training images have the same views in every epoch.
    """

    def __init__(
        self,
        images: Store,
        sampler: Sampler,
        sequence: Sequence,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        compiled: bool = False,
        fixed: bool = False,
    ):
        self.images = images
        self.fixed = fixed
        self.sampler = sampler
        self.sequence = sequence
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1) for x in (mean, std))
        self.strength: Tensor | None = None  # of the parameters of each image's views, float32 [N, P]; None: 1
        self.compiled = compiled and sequence.compilable
        self.program = SequenceLoader._views
        if self.compiled:
            sequence.prepare()
            self.program = torch.compile(SequenceLoader._views, dynamic=False)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on; validation has the same draws in every epoch."""
        anew = self.sampler.train and not self.fixed
        number = torch.full((), epoch if anew else 0, device=self.mean.device)
        size = self.sampler.local_batch_size
        for pixels, labels, index in self.images.batches(self.sampler.batches(epoch, start)):
            if len(index) == size or not self.compiled:
                views, actions, params = self.program(self, pixels, index, number)
            elif len(index):  # the last batch of a validation
                whole = self.program(self, padded(pixels, size), padded(index, size), number)
                views, actions, params = (x[: len(index)] for x in whole)
            else:
                views, actions, params = self._views(pixels, index, number)
            yield Batch(views, actions, params, labels, index)

    def arriving(self, batches: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Batch]:
        """Batches of these positions; the visits beside them, numbers of 32 bits, address the draws of their views."""
        visits = [torch.from_numpy(visit).to(self.mean.device)[:, None, None] for _, visit in batches]
        found = self.images.batches([positions for positions, _ in batches])
        for (pixels, labels, index), visit in zip(found, visits, strict=True):
            yield Batch(*self.program(self, pixels, index, visit), labels, index)

    def restricted(self, positions: np.ndarray) -> "SequenceLoader":
        """A loader of some of its images on this process alone, whose batches are those of all processes together."""
        other = copy.copy(self)
        alone = {"rank": 0, "num_processes": 1, "drop_last": False}
        other.sampler = replace(self.sampler, indices=positions, curriculum=None, **alone)
        other.compiled, other.program = False, SequenceLoader._views
        return other

    def _views(self, pixels: Tensor, index: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views, actions and parameters, drawn for an epoch (int64, 0-dim) or for visits (int64 [B, 1, 1])."""
        sequence, stream = self.sequence, TRAIN_STREAM if self.sampler.train else VALIDATION_STREAM
        drawn = words(self.sampler.seed, stream, epoch, index, sequence.num_views, sequence.num_draws)
        views, params = sequence.sample(pixels, drawn, None if self.strength is None else self.strength[index])
        return ((views - self.mean) / self.std).contiguous(), sequence.actions(params), params

    def begin_with_the_easiest(self, curriculum: CurriculumConfig) -> None:
        """Leave it to a curriculum which images take part in an epoch.

        Raises:
            InputError: in its first epoch they would be fewer than a batch.
        """
        sampler = self.sampler
        sampler.curriculum = curriculum.share
        first, size = math.ceil(curriculum.share(0) * len(sampler.indices)), sampler.batch_size
        if first < size:
            problem = f"begins with {first} of {len(sampler.indices)} images, fewer than the {size} of a batch"
            raise InputError(problem, "data.curriculum.kind")
        sampler.difficulty = functools.cache(self._difficulty)

    def _difficulty(self) -> np.ndarray:
        """How hard the views of each image are, which are all drawn once: int64 [N], in the order of the indices."""
        positions = self.sampler.indices
        known = {}
        for batch in self.restricted(positions).epoch(0):
            hard = self.sequence.difficulty(batch.views, batch.params)
            known |= zip(batch.index.tolist(), hard.tolist(), strict=True)
        return np.array([known[position] for position in positions.tolist()])

    def clean(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each image once, without augmentation: normalised float32 [b, C, H, W], labels [b], index [b]."""
        for pixels, labels, index in self._read(self.sampler.indices):
            yield (self.sequence.unchanged(pixels) - self.mean) / self.std, labels, index

    def pixels(self, count: int) -> Tensor:
        """The first images of the subset, unchanged: uint8 [n, H, W, C] on the device."""
        return torch.cat([pixels for pixels, _, _ in self._read(self.sampler.indices[:count])])

    def _read(self, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pixels, labels and index of the images at these positions."""
        size = self.sampler.local_batch_size
        return self.images.batches(np.split(order, range(size, len(order), size)))

    def labels(self) -> np.ndarray:
        """Class of each image of the subset, int64 [n]."""
        return np.asarray(self.images.labels.cpu() if isinstance(self.images.labels, Tensor) else self.images.labels)[
            self.sampler.indices
        ]

    def redrawn(self) -> "SequenceLoader":
        """A loader of the same images whose sequences are drawn from another seed."""
        other = copy.copy(self)
        other.sampler = replace(self.sampler, seed=(self.sampler.seed + 1) % 2**32)
        return other


@dataclass(frozen=True)
class Loaders:
    """The data of a run."""

    train: SequenceLoader
    validation: SequenceLoader
    sequence: Sequence
    image_size: tuple[int, int]  # (H, W)
    classes: list[str]  # names; empty if the images have no classes, and labels are zeros then
    fingerprint: str  # of the images of both splits, equal for all loaders
    kind: str  # resident, mapped, files or ffcv
    stream: Stream | None = None  # the order in which training images arrive; None if all are there from the start
    notice: str | None = None  # a line about the images that the user should read
    validated_on: str = "test"  # what the images for validation are called: test, val, held-out
    alone: bool = False  # whether the folder has nothing to validate on, so that some images are always held out

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if the images have none."""
        return len(self.classes) or None

    @property
    def numbers(self) -> str:
        """How many images there are, in words."""
        train, validation = (len(loader.sampler.indices) for loader in (self.train, self.validation))
        return f"{train} training and {validation} {self.validated_on} images"

    @property
    def largest_class(self) -> float | None:
        """Percent of the images for validation that are of their commonest class; None if they have no classes."""
        labels = self.validation.labels()
        return 100 * float(np.bincount(labels).max() / len(labels)) if self.classes else None

    def unseen(self, run: DataConfig) -> np.ndarray:
        """Positions of the images for validation that a run of these images with these settings does not train on."""
        positions, count = self.validation.sampler.indices, len(self.train.images.labels)
        if self.validated_on != "held-out":
            return positions
        trained, _, _ = _chosen(_holding_out(run, count) if self.alone else run, count, 0)
        return positions[~np.isin(positions, trained)]


def build_loaders(
    data: DataConfig,
    sequence: SequenceConfig,
    actions: ActionsConfig = ActionsConfig(),  # noqa: B008 - frozen
    stream: StreamConfig = NoStreamConfig(),  # noqa: B008 - frozen
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    num_processes: int = 1,
    micro_batches: int = 1,
    threads: int | None = None,
    drop_last: bool = True,
    compiled: bool = False,
) -> Loaders:
    """Open the data that the config names.

    Args:
        data: which images to open.
        sequence: which views to render of them.
        actions: how the moves between views are encoded.
        stream: the order in which training images arrive.
        seed: seed of draws and order.
        device: where batches go.
        rank: number of this process.
        num_processes: number of processes that share each batch.
        micro_batches: number of micro-batches into which a training batch is split.
        threads: number of threads that read images; None is one of FFCV's, or a few more than cores that decode files.
        drop_last: whether training leaves out an incomplete last batch.
        compiled: whether one compiled program draws and renders the views.

    Raises:
        InputError: the data are missing, empty, damaged or another dataset's, or the batch does not fit them.
    """
    dataset = find_dataset(data.dataset)
    if dataset.views != sequence.views:
        known = ", ".join(name for name in DATASETS if find_dataset(name).views == sequence.views)
        needed = f"sequence.kind={sequence.kind} needs {sequence.views}: {known}"
        raise InputError(f"{data.dataset} has {dataset.views}, {needed}", "data.dataset")
    layout = find_layout(dataset, data.root)
    images: Mapping[str, Images | BetonImages]
    if layout.betons:
        if not has_ffcv():
            raise InputError(f"{layout.root}: betons need ffcv, which is not installed; {INSTALL_HINT}", "data.root")
        reading = {
            "batch_size": -(-data.batch_size // num_processes),
            "threads": threads or 1,
            "device": torch.device("cpu") if data.loader == "resident" else device,
        }
        images = {split: BetonImages(*open_beton(layout.betons, dataset, split), **reading) for split in SPLITS}
    elif data.loader == "ffcv":
        wanted = "ffcv reads betons, and data.root holds none; `seqjepa write SOURCE OUT` makes them"
        raise InputError(wanted, "data.loader")
    else:
        here = ("train",) if layout.alone else SPLITS
        how = (data.download, data.size, data.decoder, threads)
        images = {split: open_images(dataset, layout, split, *how) for split in here}
        images = {"test": images["train"], **images}
    if layout.betons and data.size is not None:
        raise InputError("betons are read as they are (null), and only image files in folders resized", "data.size")
    in_files = all(isinstance(split, Images) and isinstance(split.pixels, ImageFiles) for split in images.values())
    if data.decoder != "pillow" and not in_files:
        raise InputError(f"{data.decoder} decodes image files in folders, and {data.dataset} has none", "data.decoder")
    check_alike(layout, images)
    built = build_sequence(sequence, images["train"].size, actions, device)

    count, notices = len(images["train"].labels), []
    if layout.alone and data.held_out is None:
        data = _holding_out(data, count)
        notices.append(
            f"{layout.root}: no test/ or val/; {data.held_out} of {count} images are held out to validate on"
        )
    train_indices, validation_split, validation_indices = _chosen(data, count, len(images["test"].labels))
    taken = [(images["train"], len(train_indices)), (images[validation_split], len(validation_indices))]
    kind, cache = data.loader, Cache(data.cache)
    if kind == "auto":
        used = [(split, count) for split, count in taken if isinstance(split, Images)]
        kind = suited(used, device, cache) if used else "ffcv"
    notices += prepare(kind, images, cache)

    def load(split: str, indices: np.ndarray, *, train: bool) -> SequenceLoader:
        sampler = Sampler(
            indices,
            batch_size=data.batch_size,
            seed=seed,
            train=train,
            drop_last=drop_last and train,
            rank=rank,
            num_processes=num_processes,
            micro_batches=micro_batches if train else 1,
        )
        store = open_store(kind, images[split], device, sampler.indices)
        mean, std = images["train"].statistics()  # measured when the training images were read
        how = {"device": device, "compiled": compiled, "fixed": data.fixed_views}
        return SequenceLoader(store, sampler, built, mean=mean, std=std, **how)

    train = load("train", train_indices, train=True)
    validation = load(validation_split, validation_indices, train=False)
    if data.curriculum.kind != "none":
        train.begin_with_the_easiest(data.curriculum)
    arriving = None
    if isinstance(stream, TasksConfig):
        splits = [
            Split(loader.sampler.indices, np.asarray(images[split].labels))
            for loader, split in ((train, "train"), (validation, validation_split))
        ]
        tasks: list[Task] = stream.build(*splits, images["train"].classes, built, seed)
        arriving = Stream(stream, tasks, splits[0].labels, train.sampler)
        if tasks[0].factors is not None:
            for loader, split, kind in zip((train, validation), splits, ("train", "validation"), strict=True):
                loader.strength = torch.zeros(len(split.labels), len(built.param_names), device=device)
                for task in tasks:
                    strength = built.strengths(task.factors or (), task.strength)
                    loader.strength[torch.from_numpy(getattr(task, kind)).to(device)] = strength
    return Loaders(
        train=train,
        validation=validation,
        sequence=built,
        stream=arriving,
        notice="; ".join(notices) or None,
        validated_on=layout.name_of_test if data.held_out is None else "held-out",
        alone=layout.alone,
        image_size=(images["train"].size[0], images["train"].size[1]),
        classes=list(images["train"].classes),
        fingerprint="-".join(images[split].fingerprint()[:16] for split in SPLITS),
        kind=kind,
    )


def _holding_out(data: DataConfig, count: int) -> DataConfig:
    """The settings for a folder of `count` images with nothing to validate on, a tenth of which is held out."""
    if data.held_out is not None:
        return data
    return data.model_copy(update={"held_out": min(max(1, count // 10), data.val_subset or count)})


def _chosen(data: DataConfig, num_train: int, num_test: int) -> tuple[np.ndarray, str, np.ndarray]:
    """Positions of the training images; the split that is validated on, and positions in it."""
    seed = data.subset_seed
    if data.held_out is None:
        return subset(num_train, data.train_subset, seed), "test", subset(num_test, data.val_subset, seed + 1)
    if data.held_out >= num_train:
        raise InputError(f"leaves none of the {num_train} training images", "data.held_out")
    held_out = subset(num_train, data.held_out, seed + 2)
    rest = np.setdiff1d(np.arange(num_train), held_out)
    return rest[subset(len(rest), data.train_subset, seed)], "train", held_out
