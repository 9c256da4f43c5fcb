"""The loader that training iterates: images of a batch in, a batch of action sequences out, all on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..configs.errors import InputError
from .beton import INSTALL_HINT, BetonImages, has_ffcv, open_beton
from .config import ActionsConfig, DataConfig, SequenceConfig
from .draws import TRAIN_STREAM, VALIDATION_STREAM, words
from .resident import ResidentImages
from .sampler import Sampler, subset
from .sequences import Sequence, build_sequence
from .sources import SPLITS, Images, Tally, check_alike, check_shape, find_layout, open_images

__all__ = ["Batch", "Loaders", "SequenceLoader", "build_loaders", "padded"]


class Batch(NamedTuple):
    """A batch of action sequences. B sequences of V views, the last of which is the target."""

    views: Tensor  # float32 [B, V, C, H, W], normalised
    actions: Tensor  # float32 [B, V-1, A]; action i carries view i to view i+1
    params: Tensor  # float32 [B, V, P], absolute
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position in the dataset


class SequenceLoader:
    """Yields the batches of an epoch.

    Args:
        images: resident or beton images.
        sampler: order and sharding; a training sampler makes a training loader.
        sequence: draws and renders the views.
        mean: of the training pixels, one a channel, in [0, 1].
        std: likewise.
        device: where everything happens.
        compiled: whether views are drawn and rendered by one compiled program, of one shape.
    """

    def __init__(
        self,
        images: ResidentImages | BetonImages,
        sampler: Sampler,
        sequence: Sequence,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        compiled: bool = False,
    ):
        self.images = images
        self.sampler = sampler
        self.sequence = sequence
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.compiled = compiled
        self.program = SequenceLoader._views
        if compiled:
            sequence.prepare()
            self.program = torch.compile(SequenceLoader._views, dynamic=False)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on; validation gets the same draws whatever the epoch."""
        number = torch.full((), epoch if self.sampler.train else 0, device=self.mean.device)
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

    def _views(self, pixels: Tensor, index: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views, actions and parameters, drawn for an epoch (int64, 0-dim)."""
        sequence, stream = self.sequence, TRAIN_STREAM if self.sampler.train else VALIDATION_STREAM
        params = sequence.params(words(self.sampler.seed, stream, epoch, index, sequence.num_views, sequence.num_draws))
        views = ((sequence.render(pixels, params) - self.mean) / self.std).contiguous()
        return views, sequence.actions(params), params

    def clean(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each image once, as it is: normalised float32 [b, C, H, W], labels [b], index [b]."""
        order = self.sampler.indices
        parts = np.split(order, range(self.sampler.batch_size, len(order), self.sampler.batch_size))
        for pixels, labels, index in self.images.batches(parts):
            yield (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std, labels, index

    def pixels(self, count: int) -> Tensor:
        """The first images of the subset as they are, uint8 [n, H, W, C] on the device."""
        order = self.sampler.indices[:count]
        size = self.sampler.local_batch_size  # all that an FFCV reader takes at a time
        parts = np.split(order, range(size, len(order), size))
        return torch.cat([pixels for pixels, _, _ in self.images.batches(parts)])

    def redrawn(self) -> SequenceLoader:
        """A loader of the same images whose sequences are drawn by another seed."""
        sampler = copy.copy(self.sampler)
        sampler.seed = (sampler.seed + 1) % 2**32
        other = copy.copy(self)
        other.sampler = sampler
        return other


def padded(x: Tensor, size: int) -> Tensor:
    """`x` with its first row repeated up to `size` rows; zeros where it has none."""
    row = x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])
    return torch.cat([x, row.expand(size - len(x), *x.shape[1:])])


@dataclass(frozen=True)
class Loaders:
    """What a run reads from."""

    train: SequenceLoader
    validation: SequenceLoader
    sequence: Sequence
    num_classes: int | None  # None if the images have no classes; labels are zeros then
    fingerprint: str  # of the images of both splits, equal for both loaders
    kind: str  # ffcv or resident


def build_loaders(
    data: DataConfig,
    sequence: SequenceConfig,
    actions: ActionsConfig = ActionsConfig(),  # noqa: B008 - frozen
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    num_processes: int = 1,
    micro_batches: int = 1,
    threads: int = 1,
    drop_last: bool = True,
    compiled: bool = False,
) -> Loaders:
    """Open the data that the config names.

    Args:
        data: which images.
        sequence: which views of them.
        actions: how the moves between these are encoded.
        seed: of draws and order.
        device: where batches go.
        rank: number of this process.
        num_processes: how many share each batch.
        micro_batches: that a process cuts its part of a training batch into.
        threads: of FFCV's reader.
        drop_last: whether training leaves out the incomplete last batch.
        compiled: whether views are drawn and rendered by one compiled program.

    Raises:
        InputError: the data are missing, empty, damaged or of another kind, or the batch does not fit them.
    """
    layout = find_layout(data.dataset, data.root)
    sources: dict[str, Images | BetonImages] = {}
    kind = "resident"
    if layout.kind == "beton":
        if not has_ffcv():
            raise InputError(f"{layout.root}: betons need ffcv, which is not installed; {INSTALL_HINT}", "data.root")
        kind = "ffcv" if data.loader == "auto" else data.loader
        reading = {
            "batch_size": -(-data.batch_size // num_processes),
            "threads": threads,
            "device": device if kind == "ffcv" else torch.device("cpu"),
        }
        for split in SPLITS:
            path, sidecar = open_beton(layout.root, data.dataset, split)
            check_shape(data.dataset, str(path), sidecar.image_size, len(sidecar.classes))
            sources[split] = BetonImages(path, sidecar, **reading)
    elif data.loader == "ffcv":
        wanted = "ffcv reads betons, and data.root holds none; python -m seqjepa.loaders.write SOURCE OUT makes them"
        raise InputError(wanted, "data.loader")
    else:
        sources = {split: open_images(data.dataset, layout, split, data.download) for split in SPLITS}
    check_alike(layout.root, sources)
    built = build_sequence(sequence, sources["train"].shape[1:3], actions, device)
    sizes = {"train": data.train_subset, "test": data.val_subset}
    samplers = {
        split: Sampler(
            subset(len(sources[split].labels), sizes[split], data.subset_seed + number),
            batch_size=data.batch_size,
            seed=seed,
            train=split == "train",
            drop_last=drop_last and split == "train",
            rank=rank,
            num_processes=num_processes,
            micro_batches=micro_batches if split == "train" else 1,
        )
        for number, split in enumerate(SPLITS)
    }
    if layout.kind == "beton":
        sidecars = {split: source.sidecar for split, source in sources.items()}
        mean, std = sidecars["train"].mean, sidecars["train"].std
        prints = [sidecar.pixels_sha256 for sidecar in sidecars.values()]
        stores = sources
        if kind == "resident":
            stores = {split: ResidentImages(sources[split], device, samplers[split].indices) for split in SPLITS}
    else:
        tallies = {split: Tally(data.dataset) for split in SPLITS}
        stores = {
            split: ResidentImages(sources[split], device, samplers[split].indices, tally)
            for split, tally in tallies.items()
        }
        mean, std = tallies["train"].statistics()
        prints = [tally.fingerprint(sources[split].labels) for split, tally in tallies.items()]
    train, validation = (
        SequenceLoader(stores[split], samplers[split], built, mean=mean, std=std, device=device, compiled=compiled)
        for split in SPLITS
    )
    return Loaders(
        train=train,
        validation=validation,
        sequence=built,
        num_classes=len(sources["train"].classes),
        fingerprint="-".join(text[:16] for text in prints),
        kind=kind,
    )
