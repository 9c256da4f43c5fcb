"""Features of a frozen network, the probes on them, and the untrained network to compare with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ...configs.errors import InputError
from ...loaders.batch import Batch, each
from ...loaders.loader import Loaders, SequenceLoader, build_loaders
from ..config import Config
from ..models.seq_jepa import SeqJEPA
from ..runtime.accelerator import build_accelerator

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
    """The probes of a network, as far as the task has their targets.

    Top-1 of the class from the aggregate of each length, from z of the clean image, and (leakage) from z of the first
    view. R² of each factor of the first action from a pair of z, and (leakage) from the aggregate of `leakage_length`;
    an aggregate of two or more views received the action, so its R² measures how much of it is kept.

    Args:
        lengths: numbers of observed views.
        num_observed: number of observed views in training.
        num_classes: number of classes; None if the images have none.
        factors: dimensions of the action by factor; empty if there are no actions to predict.
    """
    probes = []
    if num_classes:
        features = {f"agg_top1_{length}": f"agg_{length}" for length in lengths}
        features |= {"z_top1": "clean", "first_top1": "first"}
        probes += [FrozenProbe(name, feature, num_classes, None) for name, feature in features.items()]
    for name, feature in (("z_r2", "pair"), ("agg_r2", f"agg_{leakage_length(lengths, num_observed)}")):
        for factor, dims in factors.items():
            probes.append(FrozenProbe(f"{name}_{factor}", feature, dims.stop - dims.start, dims))
    return probes


class FrozenNetwork:
    """A network in eval mode whose features are read; its teacher and predictor are never run.

    Args:
        model: the network; it is moved to the device, and its weights are not changed.
        lengths: numbers of observed views, in rising order.
        accelerator: sets device and precision.
    """

    def __init__(self, model: SeqJEPA, lengths: list[int], accelerator: Accelerator):
        self.model = model.to(accelerator.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.lengths = lengths
        self.accelerator = accelerator

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Float32 features [B, ...] of a batch by name: `first`, `pair` and `agg_<length>`."""
        views = max(2, self.lengths[-1])
        with self.accelerator.autocast():
            z = self.model.encoder(each(batch.views, lambda x: x[:, :views]))  # [B, N, D]
            embedded = self.model.embed(batch.actions[:, : views - 1])
            found = {"first": z[:, 0], "pair": z[:, :2].flatten(1)}
            for length in self.lengths:
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

    def read(self, loader: SequenceLoader, epochs: int, progress: Callable[[], None]) -> dict[str, Tensor]:
        """Features of all sequences of a loader.

        Args:
            loader: loader of the evaluation.
            epochs: number of renderings of each image.
            progress: called after each batch.

        Returns:
            `features` and `clean` by name, and `labels`, first `actions` and `index`, with one row per sequence.
        """
        clean = self.clean(loader)
        batches = []
        for epoch in range(epochs):
            for batch in loader.epoch(epoch):
                facts = {"labels": batch.labels, "actions": batch.actions[:, 0], "index": batch.index}
                batches.append(self.features(batch) | {"clean": clean[batch.index]} | facts)
                progress()
        return {name: torch.cat([part[name] for part in batches]) for name in batches[0]}


def open_evaluation(
    config: Config, num_observed: int, fingerprint: str, say: Callable[[str], None]
) -> tuple[Accelerator, Loaders]:
    """Build the accelerator and the loaders of an evaluation.

    Args:
        config: config of the checkpoint.
        num_observed: number of views that the evaluation needs.
        fingerprint: fingerprint of the images on which the network was trained.
        say: prints a line.

    Raises:
        InputError: there are several processes, or the data cannot be used.
    """
    accelerator = build_accelerator(config.run, 1)
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes: the evaluation runs in one (--num_processes 1)")
    torch.set_float32_matmul_precision("highest")  # regressions and neighbours need more than TF32's ten bits
    data = config.data.model_copy(update={"batch_size": config.eval.batch_size})
    sequence = config.sequence.model_copy(update={"num_observed": num_observed})
    loaders = build_loaders(
        data, sequence, config.actions, seed=config.run.seed, device=accelerator.device, drop_last=False
    )
    if fingerprint != loaders.fingerprint:
        say("these are not the images that the network was trained on")
    return accelerator, loaders


def untrained_network(config: Config, accelerator: Accelerator) -> SeqJEPA:
    """The initial network of a run, with batch-norm statistics of training batches.

    Without these statistics an untrained network would be judged in a state that no training step ever saw. The batches
    are those of the run's training, not of an evaluation, whose sequences differ.

    Args:
        config: config of the run.
        accelerator: sets device and precision.
    """
    where = {"seed": config.run.seed, "device": accelerator.device}
    loaders = build_loaders(config.data, config.sequence, config.actions, **where)
    set_seed(config.run.seed)
    model = SeqJEPA(config.model, config.target, loaders.sequence.action_dim).to(accelerator.device)
    model.to(memory_format=torch.channels_last).train()
    batches = 0
    while batches < CALIBRATION_BATCHES:
        for batch in loaders.train.epoch(batches):
            with torch.no_grad(), accelerator.autocast():
                model(batch.views, batch.actions)
            batches += 1
            if batches == CALIBRATION_BATCHES:
                break
    return model
