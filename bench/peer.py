"""The same experiment, run as the reference code (see README.md) runs it: what a user would have instead.

It uses torch's DataLoader with Pillow, one view at a time; fp32 with TF32 convolutions, eager, in NCHW; cuDNN
deterministic; AdamW and a Python loop for the teacher; four probes with an optimiser each. It reads values back in each
step. Model, objective and probes are ours, so that only the way they are run differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pillow import PillowSequences
from torch import nn
from torch.utils.data import DataLoader

from seqjepa.engine.config import Config
from seqjepa.engine.evaluation.probes import mlp
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.objectives.objective import Objective
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.sequences import ActionSpace

__all__ = ["Peer"]


@contextmanager
def _reference_settings() -> Iterator[None]:
    """Use torch's defaults and the settings of the reference code, and restore ours afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Peer:
    """A training loop that runs one step at a time.

    Args:
        config: config of the experiment: sequences, model (with an EMA teacher), objective, learning rate and batch.
        images: images to train on.
        device: device to train on.
        workers: number of the DataLoader's workers.
    """

    def __init__(self, config: Config, images: Images, device: torch.device, workers: int):
        self.config, self.device = config, device
        dataset = PillowSequences(images, config.sequence)
        self.loader = DataLoader(
            dataset,
            config.data.batch_size,
            shuffle=True,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            pin_memory=device.type == "cuda",
            drop_last=True,
        )
        self.batches = iter(())
        self.augmented = config.sequence.kind == "augment"
        action_dim, classes = dataset[0][1].shape[-1], len(images.classes)
        self.model = SeqJEPA(config.model, config.target, ActionSpace(action_dim)).to(device)
        self.objective = Objective(config.objective, config.model.prediction_width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optim.lr)
        width, features, hidden = self.model.token_width, self.model.num_features, config.probes.hidden
        heads = {
            "class": nn.Linear(width, classes),
            "action": mlp(2 * features, hidden, action_dim),
            "class_leakage": nn.Linear(features, classes),
            "action_leakage": nn.Linear(width, action_dim),
        }
        self.heads = {name: head.to(device) for name, head in heads.items()}
        self.head_optimizers = {
            name: torch.optim.Adam(head.parameters(), lr=config.probes.lr) for name, head in heads.items()
        }
        self.kept = {name: ([], []) for name in heads}  # predictions and targets of the epoch, on the host
        self.step_number = torch.zeros((), dtype=torch.long, device=device)

    def step(self) -> float:
        """Fetch a batch and train on it; returns the loss."""
        try:
            views, parameters, labels = next(self.batches)
        except StopIteration:  # the loader's workers start again in each epoch
            self.batches = iter(self.loader)
            self.kept = {name: ([], []) for name in self.heads}
            views, parameters, labels = next(self.batches)
        with _reference_settings():
            return self.learn(views.to(self.device), parameters.to(self.device), labels.to(self.device))

    def learn(self, views: torch.Tensor, parameters: torch.Tensor, labels: torch.Tensor) -> float:
        """Train one step on a batch that is on the device."""
        moves = F.normalize(parameters, dim=1).diff(dim=1) if self.augmented else parameters
        self.model.train()
        self.optimizer.zero_grad()
        model = self.model
        z = model.encoder.features(views[:, :-1].flatten(0, 1)).unflatten(0, (len(views), -1))
        with torch.no_grad():
            target = model.target.teacher.features(views[:, -1])
        output = model.predict(z, target[:, None], moves)
        loss, _ = self.objective(output, self.step_number)
        loss.backward()
        self.optimizer.step()
        decay = self.config.target.decay
        for student, teacher in self.model.target.pairs(self.model.encoder):
            teacher.data = decay * teacher.data + (1 - decay) * student.data
        value = loss.item()
        first, second = output.z[:, 0].detach(), output.z[:, 1].detach()
        probed = {
            "class": (output.agg.detach(), labels),
            "action": (torch.cat([first, second], dim=1), moves[:, 0]),
            "class_leakage": (first, labels),
            "action_leakage": (output.agg.detach(), moves[:, 0]),
        }
        for name, (features, target) in probed.items():
            self.probe(name, features, target)
        return value

    def probe(self, name: str, features: torch.Tensor, target: torch.Tensor) -> None:
        """Train one probe for a step, and copy its predictions to the host."""
        optimizer, (predicted, targets) = self.head_optimizers[name], self.kept[name]
        optimizer.zero_grad()
        guess = self.heads[name](features)
        is_class = target.ndim == 1
        loss = F.cross_entropy(guess, target) if is_class else F.mse_loss(guess, target)
        loss.backward()
        optimizer.step()
        loss.item()
        predictions = guess.argmax(1) if is_class else guess.detach()
        predicted.extend(predictions.cpu().numpy())
        targets.extend(target.cpu().numpy())
