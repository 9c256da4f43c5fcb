"""A frozen network's features, what is asked of them, and the untrained network beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ...configs.errors import InputError
from ...loaders.loader import Batch, Loaders, SequenceLoader, build_loaders
from ..config import Config
from ..models.seq_jepa import SeqJEPA, build_model
from ..runtime.accelerator import build_accelerator

__all__ = ["FrozenNetwork", "FrozenProbe", "leakage_length", "open_evaluation", "questions", "untrained_network"]

CALIBRATION_BATCHES = 50  # after which a running average of momentum 0.1 has 0.5 % of its start left


class FrozenProbe(NamedTuple):
    """Something that is predicted from a feature."""

    name: str  # of the metric
    feature: str  # key of `FrozenNetwork.read`
    factor: str | None  # None asks for the class


def leakage_length(lengths: list[int], num_observed: int) -> int:
    """Number of views of the aggregate that is asked for the action: that of training, or else the largest."""
    return num_observed if num_observed in lengths else lengths[-1]


def questions(lengths: list[int], num_observed: int, factors: dict[str, slice]) -> list[FrozenProbe]:
    """All that is asked of a network.

    Top-1 of the class from the aggregate of each length, from z of the clean image, and (leakage) from z of the first
    view; R² of each factor of the first action from a pair of z, and (leakage) from the aggregate of `leakage_length`.
    From two views on that was given the action: its R² says what it keeps of it.

    Args:
        lengths: numbers of observed views.
        num_observed: of the training.
        factors: of the actions.
    """
    leaking = leakage_length(lengths, num_observed)
    return [
        *(FrozenProbe(f"agg_top1_{length}", f"agg_{length}", None) for length in lengths),
        FrozenProbe("z_top1", "clean", None),
        FrozenProbe("first_top1", "first", None),
        *(FrozenProbe(f"z_r2_{factor}", "pair", factor) for factor in factors),
        *(FrozenProbe(f"agg_r2_{factor}", f"agg_{leaking}", factor) for factor in factors),
    ]


class FrozenNetwork:
    """A network in eval mode whose features are read; its teacher and predictor are never run.

    Args:
        model: of which nothing changes.
        lengths: numbers of observed views, growing.
        accelerator: precision.
    """

    def __init__(self, model: SeqJEPA, lengths: list[int], accelerator: Accelerator):
        self.model = model.eval().requires_grad_(False)
        self.lengths = lengths
        self.accelerator = accelerator

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Float32 features of a batch by name, [B, ...]: `first`, `pair` and `agg_<length>`."""
        views = max(2, self.lengths[-1])
        with self.accelerator.autocast():
            z = self.model.encode(batch.views[:, :views])  # [B, N, D]
            embedded = self.model.embed(batch.actions[:, : views - 1])
            found = {"first": z[:, 0], "pair": z[:, :2].flatten(1)}
            for length in self.lengths:
                found[f"agg_{length}"] = self.model.aggregate(z[:, :length], embedded[:, : length - 1])
        return {name: feature.float() for name, feature in found.items()}

    @torch.no_grad()
    def clean(self, loader: SequenceLoader) -> Tensor:
        """Features of the clean images, float32 [N, D], at their positions in the dataset."""
        table = torch.zeros(int(loader.sampler.indices.max()) + 1, self.model.num_features, device=loader.mean.device)
        for images, _, index in loader.clean():
            with self.accelerator.autocast():
                table[index] = self.model.encode(images[:, None])[:, 0].float()
        return table

    def read(self, loader: SequenceLoader, epochs: int, progress: Callable[[], None]) -> dict[str, Tensor]:
        """All that `loader`'s sequences show in so many epochs.

        Args:
            loader: of an evaluation.
            epochs: number of renderings.
            progress: called after each batch.

        Returns:
            Features by name, `clean` among them, and `labels`, first `actions` and `index`, a row a sequence.
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
    """Accelerator, and loaders of an evaluation's sequences.

    Args:
        config: of the checkpoint.
        num_observed: views that the evaluation needs.
        fingerprint: of the images that the network was trained on.
        say: prints a line.

    Raises:
        InputError: several processes were started, or the data cannot be used.
    """
    accelerator = build_accelerator(config.run, 1)
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes: the evaluation runs in one (--num_processes 1)")
    torch.set_float32_matmul_precision("highest")  # regressions and neighbours are worth more than TF32's ten bits
    data = config.data.model_copy(update={"batch_size": config.eval.batch_size})
    sequence = config.sequence.model_copy(update={"num_observed": num_observed})
    loaders = build_loaders(
        data, sequence, config.actions, seed=config.run.seed, device=accelerator.device, drop_last=False
    )
    if fingerprint != loaders.fingerprint:
        say("these are other images than it was trained on")
    return accelerator, loaders


def untrained_network(config: Config, loaders: Loaders, accelerator: Accelerator) -> SeqJEPA:
    """The network that a run started from, its batch-norm statistics those of training batches.

    Without them an untrained network would be judged in a state that no training step ever saw.

    Args:
        config: of the run.
        loaders: of its training, not of an evaluation: the statistics are to be those of the run.
        accelerator: device and precision.
    """
    set_seed(config.run.seed)
    model = build_model(config.model, config.target, loaders.sequence.action_dim).to(accelerator.device)
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
