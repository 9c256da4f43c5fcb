"""Features of a frozen network, the probes on them, and the untrained network to compare with."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ...loaders.batch import Batch, each
from ...loaders.loader import SequenceLoader, build_loaders
from ..analysis.accumulators import with_float64
from ..config import Config
from ..models.seq_jepa import SeqJEPA

Progress = Callable[[], None]  # called after each batch
Rows = dict[str, Tensor]  # by name, with one row per sequence
CALIBRATION_BATCHES = 50  # after which a running average of momentum 0.1 holds 0.5 % of its initial value


class FrozenProbe(NamedTuple):
    """A prediction from a feature."""

    name: str  # name of the metric
    feature: str  # key of what `FrozenNetwork.read` returns
    outputs: int  # number of classes, or of predicted dimensions of the action
    dims: slice | None  # predicted dimensions of the first action; None if the class is predicted


def leakage_length(lengths: list[int], num_observed: int) -> int:
    """Number of views whose aggregate is probed for the action: that of training, or else the largest."""
    return num_observed if num_observed in lengths else lengths[-1]


def frozen_probes(
    lengths: list[int], num_observed: int, num_classes: int | None, factors: dict[str, slice]
) -> list[FrozenProbe]:
    """The probes of a network that was trained on `num_observed` views, as far as the task has their targets.

    Top-1 of the class, if there are any, from the aggregate of each length and from the mean z of the same views, from
    z of the clean image, and (leakage) from z of the first view. R² of the first action and of each of its factors, if
    there are any, given as dimensions of the action, from a pair of z, and (leakage) from the aggregate of
    `leakage_length`; an aggregate of two or more views received the action, so its R² measures how much of it is kept.
    """
    probes = []
    if num_classes:
        features = {f"agg_top1_{length}": f"agg_{length}" for length in lengths}
        features |= {f"mean_top1_{length}": f"mean_{length}" for length in lengths}
        features |= {"z_top1": "clean", "first_top1": "first"}
        probes += [FrozenProbe(name, feature, num_classes, None) for name, feature in features.items()]
    for name, feature in (("z_r2", "pair"), ("agg_r2", f"agg_{leakage_length(lengths, num_observed)}")):
        if factors:
            size = max(dims.stop for dims in factors.values())
            probes.append(FrozenProbe(name, feature, size, slice(0, size)))
        for factor, dims in factors.items():
            probes.append(FrozenProbe(f"{name}_{factor}", feature, dims.stop - dims.start, dims))
    return probes


class FrozenNetwork:
    """A network in eval mode, on the accelerator's device and in its precision, whose features are read.

    Its teacher and predictor are never run, and its weights are not changed. Lengths, the numbers of observed views
    that are aggregated, rise.
    """

    def __init__(self, model: SeqJEPA, lengths: list[int], accelerator: Accelerator):
        self.model = model.to(accelerator.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.lengths = lengths
        self.accelerator = accelerator

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Float32 features [B, ...] of a batch by name: `first`, `pair`, `agg_<length>` and `mean_<length>` (of z)."""
        views = max(2, self.lengths[-1])
        with self.accelerator.autocast():
            z = self.model.encoder(each(batch.views, lambda x: x[:, :views]))  # [B, N, D]
            embedded = self.model.embed(batch.actions[:, : views - 1])
            found = {"first": z[:, 0], "pair": z[:, :2].flatten(1)}
            for length in self.lengths:
                found[f"mean_{length}"] = z[:, :length].mean(1)
                found[f"agg_{length}"] = self.model.aggregate(z[:, :length], embedded[:, : length - 1])
        return {name: feature.float() for name, feature in found.items()}

    @torch.no_grad()
    def clean(self, loader: SequenceLoader) -> Tensor:
        """Features of the unchanged images, float32 [N, D], at their positions in the dataset."""
        table = torch.zeros(int(loader.sampler.indices.max()) + 1, self.model.num_features, device=loader.mean.device)
        for images, _, index in loader.clean():
            with self.accelerator.autocast():
                table[index] = self.model.encoder(images[:, None])[:, 0].float()
        return table

    def read(self, loader: SequenceLoader, epochs: int, progress: Progress) -> Rows:
        """`features` and `clean` of all sequences of a loader, in `epochs` renderings of each image, as `rows_of`."""
        clean = self.clean(loader)
        return rows_of(loader, epochs, lambda batch: self.features(batch) | {"clean": clean[batch.index]}, progress)


def rows_of(
    loader: SequenceLoader, epochs: int, features: Callable[[Batch], dict[str, Tensor]], progress: Progress
) -> Rows:
    """Features of each batch, its `labels`, first `actions` and `index`; on the CPU if the device has no float64."""
    batches = []
    for batch in itertools.chain.from_iterable(map(loader.epoch, range(epochs))):
        facts = {"labels": batch.labels, "actions": batch.actions[:, 0], "index": batch.index}
        batches.append(features(batch) | facts)
        progress()
    return {name: with_float64(torch.cat([part[name] for part in batches])) for name in batches[0]}


def untrained_network(config: Config, accelerator: Accelerator, loader: SequenceLoader | None = None) -> SeqJEPA:
    """The initial network of a run, with batch-norm statistics of training batches.

    Without these statistics an untrained network would be judged in a state that no training step ever saw. The batches
    are those of the run's training, not of an evaluation, whose sequences differ; they are of `loader` if it is given.
    """
    if loader is None:
        where = {"seed": config.run.seed, "device": accelerator.device}
        loader = build_loaders(config.data, config.sequence, config.actions, **where).train
    set_seed(config.run.seed)
    model = SeqJEPA(config.model, config.target, loader.sequence.action_space).to(accelerator.device)
    model.to(memory_format=torch.channels_last).train()
    epochs = map(loader.epoch, itertools.count(0, len(loader)))
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), CALIBRATION_BATCHES):
        with torch.no_grad(), accelerator.autocast():
            model(batch.views, batch.actions)
    return model
