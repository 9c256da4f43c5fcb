"""Going on from a checkpoint: what is refused, and what is said about changes since then."""

import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from ...configs.errors import InputError
from ...loaders.loader import Loaders
from ..config import Config, compose
from ..runs.checksums import MANIFEST
from ..runs.folder import RunFolder
from ..runs.state import Settled, TrainingState
from ..runs.tensors import read
from ..runtime.accelerator import compile_mode
from ..runtime.config import RunConfig
from .optimizers import learning_rate
from .segments import Segments
from .step import TrainingStep


class Resumed(NamedTuple):
    """The checkpoint that a run continues."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: TrainingState
    config: Config
    changed: dict[str, tuple[Any, Any]]  # settings that differ: value of the checkpoint, value now

    @classmethod
    def read(cls, path: Path, folder: RunFolder, rank: int) -> Self:
        """Read a checkpoint and compare its config with that of the run in `folder`.

        Raises:
            InputError: the checkpoint cannot be read, was trained with other settings, or has some that are not known.
        """
        tensors, state = read(path, rank)
        config = compose([], (f"{path}", state.config)).config
        return cls(path, tensors, state, config, folder.check_same_experiment(config, path))

    @property
    def identity(self) -> str:
        """What is equal on all processes if they have read the same checkpoint."""
        manifest = self.path / MANIFEST
        return manifest.read_text() if manifest.exists() else str(self.path)

    def check_fits(self, loaders: Loaders, segments: Segments) -> None:
        """Refuse other images than those that were trained on, and a position that the run does not have.

        Raises:
            InputError: names the field at fault.
        """
        (segment, step), path = self.state.position, self.path
        if self.state.images == "unknown":
            raise InputError(f"{path}: was imported from other code, and has no state of an optimiser", "run.resume")
        if self.state.images != loaders.fingerprint:
            raise InputError(f"holds other images than {path} was trained on{self.state.other_pillow()}", "data.root")
        begun = segment + (step > 0)
        if begun > len(segments):  # other settings of the length cannot change
            reached = f"is in epoch {begun}" if step else f"has {begun}"
            raise InputError(f"is {len(segments)}, {path} {reached} already; at least {begun} is allowed", "run.epochs")
        if step and step > segments.steps(segment):
            raise InputError(f"is at step {step} of {segments.steps(segment)}", "run.resume")


def settle(run: RunConfig, accelerator: Accelerator) -> Settled:
    """The values that settings such as run.precision=auto have on this machine."""
    return Settled(
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        precision=accelerator.mixed_precision.replace("no", "fp32"),
        compile=compile_mode(run, accelerator),
    )


def changes(resumed: Resumed, training: TrainingStep, now: Settled, step: int | None) -> list[str]:
    """Lines on what has changed since the checkpoint was saved, and on what that means for the run.

    `now` are the values that this machine gives to `auto`; `step` is the number of the next optimiser step, None after
    the last.
    """
    config, changed, lines = training.config, dict(resumed.changed), []
    before = resumed.state.settled or now
    for name in ("device", "precision", "compile", "processes"):
        if (old := getattr(before, name)) != (new := getattr(now, name)):
            changed.setdefault("the number of processes" if name == "processes" else f"run.{name}", (old, new))
    if changed:
        fields = ", ".join(f"{field} from {old!r} to {new!r}" for field, (old, new) in changed.items())
        lines.append(f"changed since the checkpoint: {fields}")

    def rows(accumulate: int, processes: int) -> int:
        shared = processes if config.run.batch_statistics == "process" else 1
        return config.data.batch_size // accumulate // shared

    accumulate, _ = changed.get("optim.accumulate", (config.optim.accumulate, None))
    old, new = rows(accumulate, before.processes), rows(config.optim.accumulate, now.processes)
    if old != new:
        lines.append(
            f"batch norm and the terms of the objective now see {new} sequences at a time instead of {old}: "
            "the run continues, with other results than it would have had"
        )
    local = training.model.local
    if "run.epochs" in changed and step and local is not None and local.in_turn:
        first, steps = local.span(step, training.total_steps)
        turn = f"block {step * len(local.heads) // training.total_steps + 1} of {len(local.heads)}"
        lines.append(
            f"the turns are spread over other epochs: the next step is {step - first + 1} of {steps} of {turn}"
        )
    elif "run.epochs" in changed and step and not config.stream.has_tasks:
        lines += _schedule_changes(training, changed["run.epochs"], step)
    return lines


def _schedule_changes(training: TrainingStep, epochs: tuple[int, int], step: int) -> list[str]:
    """How learning rate and teacher's decay jump at a step, if their schedules no longer span as many epochs."""
    optim, target, steps_per_epoch = training.config.optim, training.model.target, training.steps_per_epoch
    earlier, total = (number * steps_per_epoch for number in epochs)
    schedules = {
        "learning rate": lambda step, total: learning_rate(optim, step, steps_per_epoch, total),
        "teacher's decay": lambda step, total: target.decay(torch.tensor(step), total).item(),
    }
    lines = []
    for name, schedule in schedules.items():
        was, same_step = schedule(step - 1, earlier), schedule(step - 1, total)
        if not math.isclose(was, same_step, rel_tol=1e-6):
            lines.append(
                f"the {name} was {was:.6g} in the last step and is {schedule(step, total):.6g} in the next: "
                f"its schedule is now spread over {epochs[1]} epochs"
            )
    return lines
