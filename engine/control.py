"""The untrained control: the run's probes on the frozen network that it starts from, for as many epochs as the run
or `control.max_epochs`.

A figure means nothing without it: on CIFAR-10 rotations an untrained ResNet-18 passes the reference's gates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from pydantic import TypeAdapter

from seqjepa.engine.config import Config
from seqjepa.engine.config_method import SIGRegConfig, VICRegConfig
from seqjepa.engine.environment import versions
from seqjepa.engine.gates import OF_THE_OBJECTIVE
from seqjepa.engine.learner import Diverged, Learner
from seqjepa.engine.records import to_json, write_atomically
from seqjepa.loaders import InputError
from seqjepa.loaders.loader import Loaders

__all__ = ["control_key", "untrained_control"]

PACKAGE = Path(__file__).resolve().parent.parent
# code that decides the control's figures; a change of it makes cached ones stale
MODULES = ("collapse", "config_method", "control", "encoders", "learner", "losses", "metrics", "model", "objectives")
MODULES += ("probes", "processes", "targets")
# of the target's config what an untrained network's answers depend on; a teacher never moves
TARGET_FIELDS = {"batch_statistics", "sharpening", "temperature", "center_momentum"}


def control_epochs(config: Config) -> int:
    return min(config.run.epochs, config.control.max_epochs)


def control_key(config: Config, loaders: Loaders, accelerator: Accelerator) -> str:
    """What the control depends on, as a digest: images, sequences, model, probes, tier, seed, precision, code."""
    data = config.data.model_dump(include={"dataset", "batch_size", "train_subset", "val_subset", "subset_seed"})
    sources = [PACKAGE / "engine" / f"{name}.py" for name in MODULES]
    sources += [
        PACKAGE / "kernels" / "views.py",
        PACKAGE / "kernels" / "coding_rate.py",
        *sorted((PACKAGE / "loaders").rglob("*.py")),
    ]
    parts = {
        "data": data,
        "images": loaders.fingerprint,
        "sequence": config.sequence.model_dump(),
        "actions": config.actions.model_dump(),
        "model": config.model.model_dump(),
        "target": config.target.model_dump(include=TARGET_FIELDS) | {"teacher": config.target.kind == "ema"},
        "rate": config.rate.model_dump(exclude={"weight", "target"}),
        "compared": [config.objective.prediction == "cross_entropy", config.objective.temperature],
        "symmetric": config.objective.symmetric,
        "probes": config.probes.model_dump(),
        "shuffled": config.ablation.shuffle_actions,
        "accumulate": config.optim.accumulate,
        "epochs": control_epochs(config),
        "seed": config.run.seed,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": [accelerator.num_processes, accelerator.num_processes > 1 and config.run.batch_statistics],
        "torch": versions()["torch"],
        "code": hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


METRICS = TypeAdapter(dict[str, float | None])  # of the cache; null is NaN


def untrained_control(
    config: Config,
    loaders: Loaders,
    accelerator: Accelerator,
    *,
    say: Callable[[str], None],
    progress: Callable[[str, int], None],
    check: Callable[[], None],
) -> dict[str, float]:
    """Metrics of the control, from the cache or run now.

    Args:
        config: of the run.
        loaders: what the run reads from.
        accelerator: device, precision, processes.
        say: prints a line.
        progress: called with a description and the total before, and with "" and 1 after each step.
        check: called between steps; may raise to leave early.
    """
    path = (
        Path(config.control.cache).expanduser() / f"{config.data.name}-{control_key(config, loaders, accelerator)}.json"
    )
    cached = [_read(path) if accelerator.is_main_process else None]
    broadcast_object_list(cached)
    if cached[0] is not None:
        say(f"untrained control: cached in {path}")
        return cached[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror})", "control.cache") from None
    epochs = control_epochs(config)
    say(f"untrained control: {epochs} epochs of probes on the frozen initial network (once; then cached)")
    set_seed(config.run.seed)
    learner = Learner(_without_terms(config), loaders, accelerator, train_model=False)
    progress("untrained control", epochs * learner.steps_per_epoch)
    step = 0
    for epoch in range(epochs):
        for batch in loaders.train.epoch(epoch):
            learner.step(batch, step)
            step += 1
            progress("", 1)
            check()
    metrics = learner.epoch_metrics() | learner.validate(loaders.validation, check)
    metrics = {name: value for name, value in metrics.items() if not name.startswith(OF_THE_OBJECTIVE)}
    if found := learner.diverged():
        raise Diverged(f"diverged: the untrained control's {found[1]} was not finite at step {found[0]}")
    if accelerator.is_main_process:
        write_atomically(path, to_json(metrics))
    return metrics


def _without_terms(config: Config) -> Config:
    """The config without what an untrained network's answers do not depend on, so that variants share a control."""
    objective = config.objective.model_copy(update={"prediction_weight": None})
    rate = config.rate.model_copy(update={"weight": 0.0})
    return config.model_copy(
        update={"objective": objective, "rate": rate, "sigreg": SIGRegConfig(), "vicreg": VICRegConfig()}
    )


def _read(path: Path) -> dict[str, float] | None:
    """A cached control, NaN where null stands; None if there is none or it was cut short."""
    try:
        metrics = METRICS.validate_json(path.read_bytes(), strict=True) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if metrics is None:
        return None
    return {name: math.nan if value is None else value for name, value in metrics.items()}
